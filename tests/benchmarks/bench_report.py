"""`egrsd report` of a run of 100 000 traces: its size, the time to write it, and the time Chromium takes to open it."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "report")]

TRACES = 100_000


def measure(num_traces: int = TRACES, opens: int = 5) -> dict[str, float]:
    """megabytes, seconds_to_write, and, where there is a browser, seconds_to_open: to the page being drawn, best of `opens`."""
    import browser
    from report_runs import large_run

    from jobs.report import report_run

    with tempfile.TemporaryDirectory() as folder:
        store = large_run(Path(folder), num_traces)
        start = time.perf_counter()
        report_run([store.uri], None, None, True)
        written = time.perf_counter() - start
        path = Path(store.uri) / "report.html"
        figures = {"megabytes": path.stat().st_size / 1e6, "seconds_to_write": written, "traces": float(num_traces)}
        if browser.missing() is None:
            with browser.chromium() as driver:
                figures["seconds_to_open"] = min(_open(driver, path) for _ in range(opens))
        return figures


def _open(driver: object, path: Path) -> float:
    driver.get("about:blank")  # type: ignore[attr-defined]
    driver.get(f"file://{path}")  # type: ignore[attr-defined]
    ready = "return performance.getEntriesByName('report-ready')[0].startTime"
    return float(driver.execute_script(ready)) / 1000  # type: ignore[attr-defined]


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name:20s} {value:,.2f}")
