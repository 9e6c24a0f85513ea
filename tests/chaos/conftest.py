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

KILL = "kill"  # name of the property of a test's report that holds [what engine, kind of victim, a line]


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
def held(record_property: Callable[[str, object], None]) -> Callable[[str, list[Kill]], None]:
    """Notes kills whose run was found whole; they travel with the test's report, also from another process."""

    def note(engine: str, kills: list[Kill]) -> None:
        for kill in kills:
            record_property(KILL, [engine, kill.kind, kill.text()])

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Every kill, and how many of each kind."""
    passed = terminalreporter.getreports("passed")
    kills = [value for report in passed if report.when == "call" for name, value in report.user_properties if name == KILL]
    if not kills:
        return
    terminalreporter.section("kills after which everything held")
    for engine, _, text in kills:
        terminalreporter.write_line(f"{engine:8} {text}")
    counts = Counter((engine, kind) for engine, kind, _ in kills)
    for engine in dict.fromkeys(engine for engine, *_ in kills):
        parts = [f"{kind} {number}" for (of, kind), number in sorted(counts.items()) if of == engine]
        terminalreporter.write_line(f"{engine}: {sum(of == engine for of, *_ in kills)} kills: {', '.join(parts)}")
