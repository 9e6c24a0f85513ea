"""The command that the harness starts, kills and starts again: `egrsd distill`, with a fake engine in vLLM's place.

    python tests/chaos/driver.py RUN ADDRESS START_S BATCH_S name=value ...

START_S, BATCH_S: seconds an engine takes to load and for a batch. ADDRESS "local": a Ray of its own, as on a laptop.
"""

from __future__ import annotations

import sys
from functools import partial

from jobs.screen.keeper import keep


def main() -> None:
    """Run or resume the run."""
    keep()
    from actors import watch
    from actors.fakes import UNWATCHED, Behaviour, FakeEngine
    from jobs.distill import distill
    from jobs.settle import Choices

    uri, address, start_s, batch_s, *sets = sys.argv[1:]
    for name in [name for name in sets if name.startswith("watch.")]:  # the patience of actors/watch.py, in seconds
        sets.remove(name)
        constant, value = name.removeprefix("watch.").split("=")
        setattr(watch, constant, float(value))
    engine = partial(FakeEngine, behaviour=Behaviour(start_s=float(start_s), batch_s=float(batch_s)))
    distill(uri, Choices("demo", [*UNWATCHED, *sets]), address, engine_class=engine)


if __name__ == "__main__":
    main()
