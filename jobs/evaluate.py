"""`egrsd evaluate`: policies of a run answer benchmarks and other problems, through the run's engines, store and grader.

evals/<source>-<settings>/<policy>/   prompts, rollout, grade: shards like those of a round; only what is missing is made
evals/<source>-<settings>/summary.json  every figure with its interval, and beside it what decided it
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from jobs.engines import open_engines
from jobs.opened import hold, open_folder, open_run, start
from jobs.progress import Bars
from jobs.settle import parse_numbers
from jobs.terminal import Session, session
from pipeline.config import Run, differences, load, resolve
from pipeline.errors import SettingError, SourceError, UserError
from pipeline.evidence.evaluation import FIGURES, Samples, figures, macro, samples
from pipeline.evidence.evaluation import differences as paired
from pipeline.fit.versions import versions
from pipeline.models.tokenizer import template_hash, tokenizer_of
from pipeline.problems.benchmarks import benchmark, near, open_benchmark
from pipeline.problems.sources import Problem, ProblemSet, open_source
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.metrics import Estimate
from pipeline.rounds.plan import read_plan
from pipeline.rounds.round import Round, evaluation_run, plan_round, problems_digest, with_engines
from pipeline.stages import EVALUATION, STAGES
from pipeline.store.directory import Store

if TYPE_CHECKING:
    from actors.member import EngineClass

TRACES_PER_SHARD = 32  # what a kill costs at most, per shard in flight
# what tells one evaluation from another: the policy's answers, or their grades, would differ
IDENTITY = (
    *("seed", "source", "prompts", "model.path", "model.revision", "model.dtype", "model.max_model_len"),
    *(f"rollout.{name}" for name in ("group_size", "temperature", "top_p", "top_k", "max_new_tokens")),
    *("grade.verifier", "grade.answer_pattern"),
)
READS = ("evaluation.", "grade.", "prompts.", "engines.", "model.max_model_len", "model.dtype", "seed")


@dataclass(frozen=True)
class Asked:
    """One source to evaluate on: its name, the run whose rounds its evaluations are, its problems, and k of pass@k."""

    name: str
    run: Run
    source: ProblemSet
    k: int

    @property
    def kind(self) -> str:
        """Folder of this source under these settings; its subfolders are policies."""
        return f"evals/{self.name}-{self.run.digest(IDENTITY)[:8]}"

    @property
    def problems(self) -> int:
        """How many of its problems are asked."""
        return min(len(self.source), self.run.rollout.prompts_per_round)


def evaluate(
    uri: str,
    policies: str,
    specs: list[str],
    k: int | None,
    sets: list[str],
    address: str | None,
    debug: bool,
    engine_class: EngineClass | None = None,
) -> None:
    """Evaluate `policies` (numbers, and `last`) on every source of `specs`; no source: the run's own held-out problems.

    `k` samples a problem, unless `--set evaluation.samples=n` asks for more: pass@k is then the unbiased estimate from n.
    """
    with session(debug) as out:
        store, run = open_run(uri)
        numbers = chosen_policies(store, policies)
        asked = [ask(run, spec, k, sets) for spec in specs or [""]]
        if twice := [a.kind for i, a in enumerate(asked) if a.kind in {b.kind for b in asked[:i]}]:
            raise UserError("is given twice with the same settings", f"--source {twice[0].removeprefix('evals/')}")
        for caution in {one.source.caution() for one in asked} - {None}:
            out.say(str(caution))
        template = tokenizer_hash(asked[0].run)
        if any(missing(store, one, number) for one in asked for number in numbers):
            evals = open_folder(store.locate("evals"))
            hold(out, evals)
            start(out, store, address, held=evals)
            answer(store, asked, numbers, out, engine_class)
        found = {one.kind: {number: read(store, one, number) for number in numbers} for one in asked}
        for one in asked:
            summary = summarise(store, one, found[one.kind], template)
            store.write_json(f"{one.kind}/summary.json", summary)
            show(out, one, summary)
            out.say(f"{store.locate(one.kind)}/summary.json")
        if len(asked) > 1:
            show_macro(out, asked, found)


def chosen_policies(store: Store, text: str) -> list[int]:
    """Policy versions of `0,last`, in order and each once. Raises UserError for one that was never published."""
    last = store.latest_policy()
    words = [str(last) if word.strip() == "last" else word for word in text.split(",")]
    numbers = list(dict.fromkeys(parse_numbers(",".join(words), "--policy", "0,last or 0..3")))
    for number in numbers:
        if not store.has_policy(number):
            raise UserError(f"policy {number} is not published", store.locate("policy"), f"Policies here: 0 to {last}")
    return numbers


# ---- what is asked -----------------------------------------------------------------------------------------------------


def ask(run: Run, spec: str, k: int | None, sets: list[str]) -> Asked:
    """A source with the settings it is asked under, checked before anything starts.

    Raises SettingError (k, a setting that evaluation does not read) and SourceError (unreadable, unknown, without answers, fewer
    problems than a bootstrap needs).
    """
    changed = resolve(run, sets)
    named = {override.partition("=")[0].strip() for override in sets}
    for setting, _, _ in differences(run, changed):
        if not setting.startswith(READS):
            raise SettingError("evaluation does not read this setting", setting, f"It reads {', '.join(READS)}")
    if k is not None and k < 1:
        raise SettingError(f"is {k}: at least one sample a problem is needed", "-k", "For example -k 4")
    number = changed.evaluation.samples if k is None or "evaluation.samples" in named else k
    if k is not None and number < k:
        raise SettingError(f"is {number}, fewer than -k {k}", "evaluation.samples", "pass@k needs k samples at least")
    source = _open(changed, spec, sets)
    settings: dict[str, Any] = {"source": source.source, "samples": number}
    if not ("evaluation.problems" in named or _generated(source.source.uri) or not spec):
        settings["problems"] = len(source)
    changed = changed.model_copy(update={"evaluation": changed.evaluation.model_copy(update=settings)})
    if benchmark(spec) and "grade.verifier" not in named:
        changed = changed.model_copy(update={"grade": changed.grade.model_copy(update={"verifier": "math"})})
    held_out = evaluation_run(load(changed.model_dump(mode="json")))
    shard = max(1, TRACES_PER_SHARD // number)
    held_out = held_out.model_copy(update={"rollout": held_out.rollout.model_copy(update={"prompts_per_shard": shard})})
    one = Asked(_slug(spec or source.source.uri), held_out, source, number if k is None else k)
    check_problems(one.source, one.problems)
    return one


def _open(run: Run, spec: str, sets: list[str]) -> ProblemSet:
    """The problems behind `--source`: a benchmark, a copy of one, the run's own held-out problems (empty), or any URI.

    What `--set evaluation.source.*` says holds for every source; solutions are not asked for.
    """
    if benchmark(spec):
        return open_benchmark(spec)
    own = run.evaluation.source
    if spec and spec != own.uri:
        fresh = {"uri": spec, "split": "test", "problem": "problem", "solution": "", "answer": "answer", "options": {}}
        document = run.model_dump(mode="json")
        document["evaluation"]["source"] |= fresh | {"size": 100_000, "seed": 0}
        own = resolve(load(document), [s for s in sets if s.startswith("evaluation.source.")]).evaluation.source
    if own.answer != own.solution:
        own = own.model_copy(update={"solution": ""})
    try:
        return open_source(own)
    except SourceError as error:
        if "is no file, folder" not in error.what:
            raise
        raise SourceError("is no benchmark, file, folder or kind of source", f"--source {spec}", near(spec)) from None


def _generated(uri: str) -> bool:
    """Whether a source has as many problems as one likes."""
    return uri == "tiny-arithmetic" or uri.startswith("reasoning-gym:")


def check_problems(source: ProblemSet, number: int) -> None:
    """SourceError where a bootstrap has too few problems, or no problem has an answer: before an engine starts."""
    where, number = source.source.uri, min(len(source), number)
    if number < 2:
        raise SourceError(f"{number} problem is too few for an interval over problems", where, "2 at least are needed")
    rows = source.rows(range(number))
    if usable := [row for row in rows if row.reject is None]:
        if len(usable) < 2:
            why = next(row for row in rows if row.reject is not None).detail
            raise SourceError(f"only 1 of {len(rows)} problems can be asked ({why})", where, "2 at least are needed")
        return
    remedy = "Name the columns with --set evaluation.source.problem=... and --set evaluation.source.answer=..."
    raise SourceError(f"none of its {len(rows)} problems can be asked and graded: {rows[0].detail}", where, remedy)


def _rows(one: Asked, indices: Iterable[int]) -> list[Problem]:
    return one.source.rows(list(indices))


def _slug(text: str) -> str:
    """A name for a folder: the benchmark, or what a URI ends with."""
    name = benchmark(text) or re.sub(r"\.(jsonl|ndjson|json|parquet|pq)$", "", text.rstrip("/").rpartition("/")[2])
    return re.sub(r"[^a-zA-Z0-9_.]+", "-", name).strip("-.")[:40] or "source"


def tokenizer_hash(run: Run) -> str:
    """Hash of the chat template and vocabulary that the problems are asked with. Raises ModelError."""
    return template_hash(tokenizer_of(run.model))


# ---- answers -----------------------------------------------------------------------------------------------------------


def missing(store: Store, one: Asked, number: int) -> bool:
    """Whether anything of one policy on one source has to be computed."""
    plan = read_plan(store, one.kind, number)
    if plan is None or (plan.asked, plan.source) != (one.run.rollout.prompts_per_round, one.source.fingerprint):
        return True
    work = plan_round(store, one.run, one.kind, number, number, one.source)
    seen = Inventory(work)
    return any(
        seen.why_stale(STAGES[name], shard, problems_digest(_rows(one, indices))) is not None
        for shard, indices in work.shards.items()
        for name in EVALUATION
    )


def answer(store: Store, asked: list[Asked], numbers: list[int], out: Session, engine_class: EngineClass | None) -> None:
    """Bring every policy's answers on every source up to date, with one pool of engines for all."""
    from pipeline.rounds.schedule import execute

    run = asked[0].run
    run = run.model_copy(update={"engines": run.engines.model_copy(update={"score": None})})  # nothing is scored
    inflight = run.engines.inflight_shards * max(1, run.engines.rollout.max)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with open_engines(run, engine_class) as engines, Bars(*columns, console=out.console, refresh_per_second=4) as progress:
        for one in asked:
            for number in numbers:
                work = with_engines(plan_round(store, one.run, one.kind, number, number, one.source), engines)
                bar = progress.add_task(f"{one.name}, policy {number}", total=len(work.shards) * len(EVALUATION))
                execute(work, EVALUATION, one.source, inflight=inflight, on_entry=lambda *_, bar=bar: progress.advance(bar))


def read(store: Store, one: Asked, number: int) -> Samples:
    """What a policy answered on a source."""
    return read_samples(plan_round(store, one.run, one.kind, number, number, one.source))


def read_samples(work: Round) -> Samples:
    """The samples of a finished evaluation, in the order of its problems."""
    rollouts, grades = (work.store.entries(work.area, name) for name in ("rollout", "grade"))
    tables = [(work.store.read(rollouts[shard]), work.store.read(grades[shard])) for shard in sorted(work.shards)]
    return samples(tables, work.run.rollout.group_size)


def facts(work: Round) -> dict[str, Any]:
    """What the engines of an evaluation's rollouts were; several where it was resumed on others."""
    entries = work.store.entries(work.area, "rollout").values()
    names = ("engine", "dtype", "logprobs_mode", "entropy_method")
    return {name: ", ".join(sorted({str(entry.facts[name]) for entry in entries})) for name in names}


# ---- what came out -----------------------------------------------------------------------------------------------------


def summarise(store: Store, one: Asked, found: dict[int, Samples], template: str) -> dict[str, Any]:
    """Figures, differences to the first policy, and all that decided them, as plain data. Raises UserError when fewer than two
    problems were answered and graded."""
    first, *later = found
    run, rollout = one.run, one.run.rollout
    try:
        policies = {
            str(number): {
                "figures": plain(figures(answered, one.k)),
                "verdicts": answered.verdicts,
                "rejected": answered.rejected,
            }
            for number, answered in found.items()
        }
        changes = [
            {
                "policy": number,
                "against": first,
                "figures": plain(paired(found[number], found[first], one.k)),
            }
            for number in later
        ]
    except ValueError as error:
        raise UserError(str(error), store.locate(one.kind), "`reject_reason` in its shards says why") from error
    engines = [facts(plan_round(store, run, one.kind, number, number, one.source)) for number in found]
    return {
        "source": run.source.model_dump(mode="json") | {"fingerprint": one.source.fingerprint},
        "problems": len(found[first]),
        "k": one.k,
        "samples": rollout.group_size,
        "interval": "95 % percentile bootstrap over problems, 2000 resamples; differences paired by problem",
        "policies": policies,
        "differences": changes,
        "settings": {
            **{name: getattr(rollout, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")},
            "seed": run.seed,
            "model": run.model.path,
            "revision": run.model.revision,
            "verifier": run.grade.verifier,
            "answer_pattern": run.grade.answer_pattern,
            "thinking": run.prompts.student_thinking,
            "template_hash": template,
            "prompt": run.prompts.student,
            **{name: ", ".join(sorted({e[name] for e in engines})) for name in engines[0]},
        },
        "versions": versions(),
    }


def labels(k: int, number: int) -> dict[str, tuple[str, float]]:
    """What each figure is called, and the factor it is shown with."""
    shown = (f"avg@{number}, %", f"pass@{k}, %", f"maj@{number}, %", "mean length", "median length")
    scales = (100.0, 100.0, 100.0, 1.0, 1.0, 100.0, 1.0)
    return dict(zip(FIGURES, zip((*shown, "truncated, %", "tokens per correct"), scales, strict=True), strict=True))


def show(out: Session, one: Asked, summary: dict[str, Any]) -> None:
    """The table of one source, and in its footer what stands beside every figure."""
    title = f"{one.name}: {summary['problems']} problems x {summary['samples']} samples, mean and 95 % interval over problems"
    table = _table(
        title, [f"policy {n}" for n in summary["policies"]], [f"{d['policy']} - {d['against']}" for d in summary["differences"]]
    )
    columns = [summary["policies"][n]["figures"] for n in summary["policies"]]
    changes = [d["figures"] for d in summary["differences"]]
    _fill(table, labels(one.k, summary["samples"]), columns, changes)
    for kind in ("verdicts", "rejected"):
        for name in sorted({name for policy in summary["policies"].values() for name in policy[kind]}):
            counts = [str(policy[kind].get(name, 0)) for policy in summary["policies"].values()]
            table.add_row(name if kind == "verdicts" else f"rejected: {name}", *counts, *[""] * len(changes))
    out.console.print(table)
    s = summary["settings"]
    out.say(
        f"T {s['temperature']:g}, top-p {s['top_p']:g}, top-k {s['top_k']}, at most {s['max_new_tokens']} tokens, "
        f"seed {s['seed']}; {s['engine']}, {s['dtype']}; {s['model']}, template {s['template_hash']}; verifier {s['verifier']}; "
        "lengths in tokens; maj: ties count 1/m, wrong answers are told apart by their text"
    )


def show_macro(out: Session, asked: list[Asked], found: dict[str, dict[int, Samples]]) -> None:
    """The mean over sources, each of which counts the same."""
    numbers = list(found[asked[0].kind])
    first, *later = numbers
    k, size = asked[0].k, asked[0].run.rollout.group_size
    table = _table(f"macro mean over {len(asked)} sources", [f"policy {n}" for n in numbers], [f"{n} - {first}" for n in later])
    columns = [plain(macro([(found[a.kind][n], None) for a in asked], k)) for n in numbers]
    changes = [plain(macro([(found[a.kind][n], found[a.kind][first]) for a in asked], k)) for n in later]
    _fill(table, labels(k, size), columns, changes)
    out.console.print(table)


def plain(found: dict[str, Estimate]) -> dict[str, Any]:
    """Estimates as JSON holds them: None where a bound is infinite (tokens per correct answer, without a correct one)."""
    return {name: {k: v if math.isfinite(v) else None for k, v in asdict(value).items()} for name, value in found.items()}


def _cell(value: dict[str, float | None], scale: float, signed: bool = False) -> str:
    parts = {name: math.inf if part is None else part for name, part in value.items()}
    return Estimate(**parts).text(scale, signed=signed)


def _table(title: str, columns: list[str], changes: list[str]) -> Table:
    return Table("", *columns, *changes, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))


def _fill(
    table: Table, named: dict[str, tuple[str, float]], columns: list[dict[str, Any]], changes: list[dict[str, Any]]
) -> None:
    for name, (label, scale) in named.items():
        cells = [_cell(c[name], scale) if name in c else "-" for c in columns]
        cells += [_cell(c[name], scale, signed=True) if name in c else "-" for c in changes]
        table.add_row(label, *cells)
