"""The ground of a module's chaos, its undisturbed runs, and the table of all kills at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos_ground import Ground
from chaos_run import Command, Kill

KILLS: list[tuple[str, Kill]] = []  # (what engine, kill) of runs that were then found whole


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    """A cluster of a head and two workers. Its path is short: Ray puts sockets there."""
    scratch = Path(tempfile.mkdtemp(prefix="chaos"))
    made = Ground(scratch)
    yield made
    made.close()
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a command once for each choice of settings, with nobody killed; gives the run."""
    runs: dict[tuple[str, ...], str] = {}

    def run(make: Callable[..., Command], *sets: str) -> str:
        if sets not in runs:
            uri = str(tmp_path_factory.mktemp("undisturbed") / "run")
            command = make(ground, uri, *sets)
            command.start()
            command.finish()
            runs[sets] = uri
        return runs[sets]

    return run


@pytest.fixture
def held() -> Callable[[str, list[Kill]], None]:
    """Notes kills whose run was found whole."""
    return lambda engine, kills: KILLS.extend((engine, kill) for kill in kills)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Every kill, and how many of each kind."""
    if not KILLS:
        return
    terminalreporter.section("kills after which everything held")
    for engine, kill in KILLS:
        terminalreporter.write_line(f"{engine:8} {kill.text()}")
    counts = Counter((engine, kill.kind) for engine, kill in KILLS)
    for engine in dict.fromkeys(engine for engine, _ in KILLS):
        parts = [f"{kind} {number}" for (of, kind), number in sorted(counts.items()) if of == engine]
        terminalreporter.write_line(f"{engine}: {sum(of == engine for of, _ in KILLS)} kills: {', '.join(parts)}")
