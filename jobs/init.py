"""`egrsd init`: write a settings file for somebody's own model and problems, after a look at both and at this machine."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jobs.screen.terminal import session
from pipeline.config import Source
from pipeline.errors import SettingError, UserError, command
from pipeline.fit import machine
from pipeline.inspection import draft
from pipeline.overrides import read_section
from pipeline.store.files import check_place, replace_local


def write_settings(file: str, asked: tuple[str, str], sets: list[str], replace: bool, debug: bool) -> None:
    """Write the file, and say what was found and how to go on. `asked` is (model, source).

    Raises UserError when the file is there already or cannot be written, and what `pipeline.inspection.draft` raises.
    """
    with session(debug) as out:
        path = Path(file).expanduser()
        if path.suffix not in {".yaml", ".yml"}:
            raise SettingError("is no name of a settings file", file, "Give it the ending .yaml")
        if os.path.lexists(path) and not replace:
            raise UserError("is there already", file, "Name another file, or pass --replace")
        with _explained(file):
            check_place(path)  # before source and model are read
        name = re.sub(r"\W+", "_", path.stem).strip("_") or "run"
        check, run = command("doctor", "--config", file), command("distill", "--config", file, "--run", f"runs/{name}")
        read_section(Source, {"uri": asked[1]}, "source")  # before it is shown: an address may hold credentials
        out.say(f"looking at the source {asked[1]}, the model {asked[0]} and this machine ...")
        made = draft.draft(name, *asked, sets, machine.gather(str(path.parent) if path.parent.is_dir() else "."))
        head = [
            "Settings of a run. `egrsd init` wrote them after a look at the source, the model and this machine.",
            f"Check them: {check.strip('`')}",
            f"Then run:   {run.strip('`')}",
            "`egrsd explain NAME` explains a setting. What does not stand here has its default.",
        ]
        text = made.text(head)
        draft.check(text, file)
        with _explained(file):
            replace_local(path, text)
        for note in made.notes:
            out.say(note if note.startswith("note: ") else f"note: {note}")
        out.say(f"{file} is written.")
        out.say(f"{check} checks it, and shows three prompts as the model will see them.")
        out.say(f"{run} runs it; --dry-run says what it would do.")
        out.told.result = {"file": file, "settings": made.values, "comments": made.comments, "notes": made.notes}


@contextlib.contextmanager
def _explained(file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", file, "Name a file in a folder that you may write to") from error
