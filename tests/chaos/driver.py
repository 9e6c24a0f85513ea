"""The command that the harness starts, kills and starts again: `egrsd distill`, with a fake engine in vLLM's place.

    python tests/chaos/driver.py RUN ADDRESS START_S BATCH_S name=value ...

START_S, BATCH_S: seconds an engine takes to load and for a batch. ADDRESS "local": a Ray of its own, as on a laptop.
"""

from __future__ import annotations

import sys
from functools import partial


def main() -> None:
    """Run or resume the run."""
    from actors.fakes import Behaviour, FakeEngine
    from jobs.distill import distill
    from jobs.settle import Choices

    uri, address, start_s, batch_s, *sets = sys.argv[1:]
    engine = partial(FakeEngine, behaviour=Behaviour(start_s=float(start_s), batch_s=float(batch_s)))
    distill(uri, Choices("demo", sets), address, engine_class=engine)


if __name__ == "__main__":
    main()
