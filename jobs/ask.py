"""`egrsd ask`: policies of a run answer somebody's own question, side by side, with the teacher's view of each answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.markup import escape
from rich.table import Column

from actors.pool.member import EngineClass
from jobs.engines import open_engines
from jobs.opened import hold, open_folder, open_run, start
from jobs.screen.progress import phase
from jobs.screen.tables import aligned
from jobs.screen.terminal import Session, printable, session
from jobs.settle import chosen_policies
from pipeline.errors import SettingError, refuse_unread
from pipeline.evidence.question import Answered, answers, prompt_of, reference_prompt, verdicts
from pipeline.overrides import differences, resolve
from pipeline.rounds import contents

READS = ("evaluation.", "prompts.", "engines.", "model.max_model_len", "model.dtype", "seed")


@dataclass(frozen=True)
class Question:
    """The options of the command line: the question, the policies such as `0,last`, a reference solution, and `--set` lines."""

    text: str
    policies: str
    reference: str | None
    sets: Sequence[str] = ()


def ask(uri: str, asked: Question, address: str | None, debug: bool, engine_class: EngineClass | None = None) -> None:
    """Print the answers. Nothing is written into the run but the log, and the lease of `evals/` meanwhile.

    Raises UserError for a policy that is not published or a question without room, and SettingError for a setting that an answer
    does not read. `engine_class` answers instead of vLLM in tests.
    """
    with session(debug) as out:
        store, old = open_run(uri)
        run = resolve(old, list(asked.sets))
        changed = (setting for setting, _, _ in differences(old, run))
        refuse_unread(
            "an answer does not read this setting", changed, lambda s: s.startswith(READS), lambda _: f"It reads {READS}"
        )
        if not asked.text.strip():
            raise SettingError("is empty", "the question", 'Write it in quotes: egrsd ask --run RUN "1+1"')
        numbers = chosen_policies(store, asked.policies)
        contents.refuse_other(store, old)
        privileged = reference_prompt(run, asked.text, asked.reference) if asked.reference is not None else None
        prompts = prompt_of(run, asked.text), privileged
        evals = open_folder(store.locate("evals"))  # as `evaluate` does: a run that trains can be asked meanwhile
        hold(out, evals)
        start(out, store, address, held=evals)
        one_pool = run.model_copy(update={"engines": run.engines.model_copy(update={"score": None}), "teachers": {}})
        with open_engines(one_pool, engine_class, say=out.say) as engines, phase(out, answering(numbers)):
            found = answers(store, run, numbers, prompts, engines["rollout"])
        answer, graded = verdicts(run, asked.reference, found) if asked.reference is not None else ("", [])
        show(out, asked, found, graded)
        if graded:
            out.console.print(GRADED.format(printable(answer)), style="dim", highlight=False, markup=False)
        out.console.print(NOTE.format(run.evaluation.sampling), style="dim", highlight=False)
        out.told.result = {"question": asked.text, "reference": asked.reference, "answers": [asdict(one) for one in found]}
        out.told.result |= {"verdicts": [verdict for verdict, _ in graded]} if graded else {}


GRADED = "The verdict is that of the run's grader, which reads '{}' in the reference."
NOTE = (
    "Answers were sampled {}; `--set evaluation.top_k=1` asks greedily. Means are over tokens, in nats. "
    "The teacher parts where its log-prob is lowest against the policy's: token, place, difference."
)


def answering(numbers: list[int]) -> str:
    """What goes on meanwhile, such as `policy 0 answers` or `policies 0, 2 answer`."""
    return f"policy {numbers[0]} answers" if len(numbers) == 1 else f"policies {', '.join(map(str, numbers))} answer"


def show(out: Session, asked: Question, found: list[Answered], graded: Sequence[tuple[str, str | None]] = ()) -> None:
    """Print the answers side by side, and below each its verdict and what the teacher makes of it."""
    columns = [Column(f"policy {one.policy}", overflow="fold", ratio=1) for one in found]
    table = aligned(asked.text, "", *columns)
    table.expand = out.console.is_terminal
    table.add_row("answer", *(escape(printable(one.text)) for one in found))
    if graded:
        table.add_row("verdict", *(escape(printable(f"{verdict}, read {read}" if read else verdict)) for verdict, read in graded))
    table.add_row("tokens", *(f"{one.tokens}, {one.finish_reason}" for one in found))
    table.add_row("entropy, mean", *(f"{one.entropy:.3f}" for one in found))
    table.add_row("log-prob, mean", *(f"{one.own_logprob:.3f}" for one in found))
    if any(one.teacher_logprob is not None for one in found):
        table.add_row("teacher: log-prob", *(_number(one.teacher_logprob) for one in found))
        table.add_row("teacher: entropy", *(_number(one.teacher_entropy) for one in found))
        table.add_row("teacher parts at", *(escape(printable(_partings(one))) for one in found))
    out.console.print(table, soft_wrap=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _partings(one: Answered) -> str:
    """The tokens that the teacher finds least likely, with their places and the difference of log-probs in nats."""
    return ", ".join(f"{text!r} at {place} ({apart:.2f})" for place, text, apart in one.partings) or "-"
