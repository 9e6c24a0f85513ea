"""Scripts and commands in forks of a process that has imported what they need. Imports take longer than most of what they do.

    python tests/forks.py vllm|verbs

The process reads a line of JSON from standard input for each program, and answers with a line that holds the exit code. A fork
has arguments, environment, output and exit code of its own, and shares nothing with the next one. A program whose environment
must be there while vLLM is imported cannot run here.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
ENGINE = ("vllm", "vllm.v1.worker.cpu_worker", "actors.inference.engine", "pipeline.training.rank")
VERBS = tuple(
    f"jobs.{name}"
    for name in ("cli", "compare", "distill", "evaluate", "export", "report", "scale", "stage", "submit", "sweep", "train")
)


class Forks:
    """The process, and what a test asks of it."""

    def __init__(self, kind: str) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path}
        command = [sys.executable, __file__, kind]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)

    def script(self, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, as `python PATH ARGUMENTS` would. Returns its exit code, output and errors."""
        return self._run({"script": str(path), "arguments": arguments})

    def egrsd(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run `python -m jobs ARGUMENTS` to its end, in this project's folder. `env` replaces the environment of this process."""
        return self._run({"module": "jobs", "arguments": arguments, "environment": dict(os.environ if env is None else env)})

    def _run(self, asked: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        assert self._process.stdin
        assert self._process.stdout
        with tempfile.TemporaryDirectory() as folder:
            said = [Path(folder, name) for name in ("out", "err")]
            print(json.dumps({**asked, "said": list(map(str, said))}), file=self._process.stdin, flush=True)
            code = self._process.stdout.readline()
            assert code, "the process that imports has ended"
            out, err = (path.read_text() for path in said)
        return subprocess.CompletedProcess(list(asked["arguments"]), int(code), out, err)

    def close(self) -> None:
        """End the process, which ends with its input."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


def main(kind: str) -> None:
    """Import, then run each program that is asked for in a fork."""
    if kind == "vllm":
        from actors.inference import startup
        from pipeline import config

        startup.set_environment(config.Pool(threads=1), exact=True)
    for name in ENGINE if kind == "vllm" else VERBS:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def become(asked: dict[str, Any]) -> None:
    """Be the program: its arguments, its environment, its output in files, its exit code."""
    for number, path in enumerate((os.devnull, *asked["said"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    try:
        run(asked)
    except SystemExit as ended:
        end(ended)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        end(SystemExit(1))
    end(SystemExit(0))


def end(ended: SystemExit) -> NoReturn:
    """End as Python does: threads, exit handlers, output, exit code. It only leaves its modules to the system.

    To free the modules of torch, Ray and vLLM one by one takes 1.4 s of a processor, and a command has two processes.
    """
    if not isinstance(ended.code, int | None):
        print(ended.code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit((ended.code or 0) & 0xFF if isinstance(ended.code, int | None) else 1)


def run(asked: dict[str, Any]) -> None:
    """Run the script or the module."""
    if "script" in asked:
        sys.argv, sys.path[0] = [asked["script"], *asked["arguments"]], str(Path(asked["script"]).parent)
        runpy.run_path(asked["script"], run_name="__main__")
    else:
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv, sys.path[0] = [str(ROOT / "jobs/__main__.py"), *asked["arguments"]], str(ROOT)
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1])
