"""What the verbs of the command line share: the class of a verb, and the options that several of them have.

No dear package is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from dataclasses import replace
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from jobs.screen import envelope, keeper
from pipeline.fit.versions import own_version

UsageError = cast(type[Exception], typer.BadParameter.__base__)  # Typer's own copy of Click has no public name for it


class _Word(str):
    """One word of a command line, which is no other word with the same text."""

    __slots__ = ()


class Verb(TyperCommand):
    """A verb. `--run` may be left out before the run's folder: `egrsd status runs/demo`.

    An option with one value, and a setting, is refused when it is given twice. Click itself would drop the first.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as Click does, after a look at the options in their order. Raises UsageError for a repeated one."""
        words = [_Word(arg) for arg in args]
        parser = type(self.make_parser(ctx))(ctx)
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "option":
                parameter.add_to_parser(parser, ctx)
        values, free, given = parser.parse_args(cast(list[str], list(words)))
        options = [option for option in given if not getattr(option, "is_flag", False)]
        twice = _first_twice([option.opts[0] for option in options if not option.multiple])
        twice = twice or _first_twice([f"--set {text.partition('=')[0].strip()}" for text in values.get("set") or []])
        if twice:
            raise UsageError(f"{twice} is given twice; leave one of them", ctx)
        if "run" not in values and any(one.name == "run" and one.multiple for one in options_of(self)):  # as `report` takes it
            args = [
                *(str(word) for word in words if not any(word is one for one in free)),
                *(p for w in free for p in ("--run", str(w))),
            ]
            return super().parse_args(ctx, args)
        place = None if "run" in values else self._place(ctx, free)
        if place is not None:
            at = next(number for number, word in enumerate(words) if word is free[place])
            args = ["--run", str(words[at]), *map(str, words[:at]), *map(str, words[at + 1 :])]
        return super().parse_args(ctx, args)

    def _place(self, ctx: Any, free: list[str]) -> int | None:
        """Which of the free words is the run: the first that no argument of the verb needs. `stage` needs its first one."""
        arguments = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        if not any(one.name == "run" for one in self.params):
            return None
        if any(one.nargs < 0 for one in arguments):  # sizes, as in `egrsd scale runs/demo rollout=4`
            return next((place for place, word in enumerate(free) if "=" not in word), None)
        place = 1 if self.name == "stage" else 0
        return place if len(free) > len(arguments) else None

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words behind the verb in its usage line."""
        pieces = super().collect_usage_pieces(ctx)
        return [*pieces, "[RUN]"] if any(one.name == "run" for one in self.params) else pieces


def options_of(verb: TyperCommand) -> list[Any]:
    """The options of a verb, without its arguments."""
    return [one for one in verb.params if one.param_type_name == "option"]


def _first_twice(names: list[str]) -> str | None:
    """The first name that stood before, or that lies in a section that stood before."""
    for i, name in enumerate(names):
        if any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in names[:i]):
            return name
    return None


def _note(context: typer.Context, wanted: bool) -> bool:
    """Note whether a verb is to print JSON."""
    envelope.asked.set(envelope.Asked(context.info_name or "", wanted))
    return wanted


def note_address(address: str | None) -> str | None:
    """Note the cluster, so that the commands which messages offer name it too."""
    before = envelope.asked.get()
    envelope.asked.set(envelope.Asked(before.verb, before.json, address))
    return address


def _csv_file(path: str | None) -> str | None:
    """Refuse to replace a file that is no CSV file by its name. A device may be written to."""
    if path is not None and os.path.isfile(os.path.expanduser(path)) and not path.lower().endswith(".csv"):
        raise typer.BadParameter(f"{path} is there already, and is no .csv file. Name another file.")
    return path


def recipes_like(incomplete: str) -> list[str]:
    """Names of recipes, for completion."""
    from pipeline.recipes import descriptions

    return [name for name in descriptions() if name.startswith(incomplete)]


def stages_like(incomplete: str) -> list[str]:
    """Names of stages, for completion."""
    from pipeline.stages import STAGES

    return [name for name in STAGES if name.startswith(incomplete)]


def settings_like(incomplete: str) -> list[str]:
    """Dotted names of settings, for completion."""
    from pipeline.inspection.explained import settings

    return [name for name in settings() if name.startswith(incomplete)]


RunUri = Annotated[str, typer.Option("--run", help="Run directory: a local path or a URI. `--run` may be left out.")]
Recipe = Annotated[
    str | None, typer.Option(autocompletion=recipes_like, help="Recipe to start from; none with --config or a started run.")
]
Json = Annotated[
    bool, typer.Option("--json", callback=_note, is_eager=True, help="Print one JSON document instead of text (jobs/README.md).")
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="One setting, a.b=value; may be repeated.")]
Csv = Annotated[str | None, typer.Option("--csv", callback=_csv_file, help="Write the figures to this file as CSV too.")]
Config = Annotated[
    str | None, typer.Option("--config", help="YAML file with settings, laid over the recipe, else over the defaults.")
]
Address = Annotated[
    str | None, typer.Option(callback=note_address, help="Ray cluster; default: RAY_ADDRESS, else one on this machine.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the noise of Ray and vLLM.")]


def _version(asked: bool) -> None:
    """Print the version and end."""
    if asked:
        typer.echo(f"egrsd {own_version()}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


def call(app: typer.Typer) -> None:
    """Call the command line, and end the process. Output that cannot be written, such as that of --help, ends with code 1."""
    try:
        code = app(prog_name="egrsd", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except SystemExit as ended:
        keeper.leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
        raise
    except UsageError as error:
        _show_usage(error)
        _refuse("UsageError", error.format_message(), error.ctx)  # type: ignore[attr-defined]
    except typer.Abort:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (line := envelope.lacking(error)) is None:
            raise
        typer.echo(f"error: {line}", err=True)
        _refuse("UserError", line)
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python has not written yet
        with contextlib.suppress(OSError):
            os.write(2, f"error: cannot write standard output ({error.strerror})\n".encode())
        sys.exit(1)


def _show_usage(error: Any) -> None:
    """Print how the verb is used, and the error in the form of all others. Without any word the help says all of that."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.ctx.get_help(), err=True)
        return
    if error.ctx is not None:
        typer.echo(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} -h' for help.\n", err=True)
    typer.echo(f"error: {error.format_message()}", err=True)


def _refuse(kind: str, what: str, context: Any = None) -> None:
    """End with exit code 2 before a verb has begun, with the JSON document where it is wanted."""
    if "--json" in sys.argv[1:]:
        if context is not None and context.parent is not None and not envelope.asked.get().verb:  # no word was parsed
            envelope.asked.set(replace(envelope.asked.get(), verb=context.info_name))
        typer.echo(envelope.document(envelope.Told(error=envelope.error_of(kind, what)), 2))
    sys.exit(2)


app = typer.Typer(
    name="egrsd",
    help="Entropy-guided self-distillation of reasoning models (EGRSD, CL-EGRSD) on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(_version: Version = False) -> None:
    """Entropy-guided self-distillation of reasoning models (EGRSD, CL-EGRSD) on Ray."""
