"""One evaluation of policies on one source: its problems and settings, which shards are missing, and its summary.

evals/<source>-<settings>/<policy>/      shards of prompts, rollout and grade, like those of a round
evals/<source>-<settings>/summary.json   every figure with its interval, and the settings that decided the figures
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import Run
from pipeline.contract import PooledEngines
from pipeline.errors import SettingError, SourceError, UserError, refuse_unread
from pipeline.evidence.documents import plain
from pipeline.evidence.evaluation import INTERVAL, Samples, StartBar, answer, comparable, engine_facts, figures, macro, read
from pipeline.evidence.evaluation import differences as paired
from pipeline.fit.versions import versions
from pipeline.models.tokenizers.tokenizer import template_hash, tokenizer_of
from pipeline.overrides import differences, load, resolve
from pipeline.overrides import named as settings_in
from pipeline.problems.benchmarks import benchmark, near, open_benchmark
from pipeline.problems.sources import ProblemSet, open_source
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.refused import refuse_nothing_left
from pipeline.rounds.round import evaluation_run, open_round, plan_round, planned, problems_digest
from pipeline.stages import EVALUATION, chain_of
from pipeline.store.directory import Store

# These settings decide a policy's traces or their grades. An evaluation with other values has another folder.
IDENTITY = (
    *("seed", "source", "prompts", "model.path", "model.revision", "model.dtype", "model.max_model_len"),
    *(f"rollout.{name}" for name in ("group_size", "temperature", "top_p", "top_k", "max_new_tokens")),
    *("grade.verifier", "grade.answer_pattern", "grade.fallback", "grade.set_relations"),
)
READS = ("evaluation.", "grade.", "prompts.", "engines.", "model.max_model_len", "model.dtype", "seed")


@dataclass(frozen=True)
class Asked:
    """One source to evaluate on.

    run: settings under which an evaluation is made like a round of rollouts. k: of pass@k. template: hash of the chat template
    and the vocabulary.
    """

    name: str
    run: Run
    source: ProblemSet
    k: int
    template: str

    @property
    def kind(self) -> str:
        """Folder of this source under these settings. It has one subfolder per policy."""
        return f"evals/{self.name}-{self.run.digest(IDENTITY)[:8]}"

    @property
    def problems(self) -> int:
        """Number of problems that a policy is evaluated on."""
        return min(len(self.source), self.run.rollout.prompts_per_round)

    def answer(self, store: Store, number: int, engines: Mapping[str, PooledEngines], start_bar: StartBar) -> None:
        """Have a policy answer this source, and grade the answers. Fresh shards are left alone.

        Raises UserError, with the commonest reason, when all rows were rejected.
        """
        work = plan_round(store, self.run, self.kind, number, number, self.source)
        answer(work, self.source, engines, start_bar)
        refuse_nothing_left(work, EVALUATION)

    def read(self, store: Store, number: int) -> Samples:
        """The samples of a policy whose evaluation is complete."""
        return read(open_round(store, self.run, self.kind, number))

    def with_earlier(self, store: Store, found: dict[int, Samples]) -> dict[int, Samples]:
        """`found`, and the samples of all policies that an earlier command asked and that are still fresh.

        Differences are to the first policy: of `found`, or of all where `found` has one alone.
        """
        [first, *more] = found.values()
        others = [number for number in store.numbers(self.kind) if number not in found and not is_missing(store, self, number)]
        read_here = {number: self.read(store, number) for number in others}
        known = found | {number: other for number, other in read_here.items() if comparable(other, first)}
        return known if more else dict(sorted(known.items()))


def ask(run: Run, spec: str, k: int | None, sets: list[str]) -> Asked:
    """A source and its evaluation settings, checked before an engine starts.

    Raises SettingError for a wrong k, or for a setting that evaluation does not read. Raises SourceError for a source that is
    unreadable, unknown, without answers, or too small for an interval. Raises ModelError for an unreadable tokenizer.
    """
    named = settings_in(sets)
    changed = _settings(run, sets)
    number = _samples(changed, k, "evaluation.samples" in named)
    source = _open(changed, spec, sets)
    update: dict[str, Any] = {"source": source.source, "samples": number}
    if not ("evaluation.problems" in named or _generated(source.source.uri) or not spec):
        update["problems"] = len(source)
    changed = changed.model_copy(update={"evaluation": changed.evaluation.model_copy(update=update)})
    changed = _judged(changed, spec, named)
    held_out = evaluation_run(load(changed.model_dump(mode="json")))
    check_problems(source, held_out.rollout.prompts_per_round)
    template = template_hash(tokenizer_of(held_out.model))
    return Asked(_slug(spec or source.source.uri), held_out, source, number if k is None else k, template)


def _settings(run: Run, sets: list[str]) -> Run:
    """The run with the overrides of `--set`. Raises SettingError for a setting that evaluation does not read."""
    changed = resolve(run, sets)
    refuse_unread(
        "evaluation does not read this setting",
        (setting for setting, _, _ in differences(run, changed)),
        lambda setting: setting.startswith(READS),
        lambda _: f"It reads {', '.join(READS)}",
    )
    return changed


def _judged(run: Run, spec: str, named: set[str]) -> Run:
    """The run with who decides its verdicts: what is named, else mathematics for a benchmark, else what the run says.

    Raises SettingError when a verifier and a reward are named.
    """
    reward = run.grade.verdict_reward if "grade.verdict_reward" in named else None
    if reward is not None and "grade.verifier" in named:
        raise SettingError(f"'{reward}' decides, so grade.verifier is not read", "grade.verdict_reward", "Leave one of them out")
    update: dict[str, Any] = {}
    if benchmark(spec) or "grade.verifier" in named:
        update["verdict_reward"] = reward
    if benchmark(spec) and "grade.verifier" not in named:
        update["verifier"] = "math"
    return run.model_copy(update={"grade": run.grade.model_copy(update=update)})


def _samples(run: Run, k: int | None, is_set: bool) -> int:
    """Number of samples per problem: k, unless `--set evaluation.samples` gives a number, which must be at least k."""
    if k is not None and k < 1:
        raise SettingError(f"is {k}: at least one sample a problem is needed", "-k", "For example -k 4")
    number = run.evaluation.samples if k is None or is_set else k
    if k is not None and number < k:
        raise SettingError(f"is {number}, fewer than -k {k}", "evaluation.samples", "pass@k needs k samples at least")
    return number


def _open(run: Run, spec: str, sets: list[str]) -> ProblemSet:
    """The problems of `--source`: a benchmark, a copy of one, any URI, or (empty) the run's own held-out problems.

    No source needs solutions. Raises SettingError for `--set evaluation.source.*` with a benchmark.
    """
    if benchmark(spec):
        refuse_unread(
            f"benchmark {spec} has columns and a split of its own, and does not read this setting",
            sorted(settings_in(sets)),
            lambda setting: not setting.startswith("evaluation.source"),
            lambda _: "Leave it out, or evaluate the other sources with a command of their own",
        )
        return open_benchmark(spec)
    source = run.evaluation.source
    if spec and spec != source.uri:
        fresh = {"uri": spec, "split": "test", "problem": "problem", "solution": "", "answer": "answer", "options": {}}
        document = run.model_dump(mode="json")
        document["evaluation"]["source"] |= fresh | {"size": 100_000, "skip": 0, "seed": 0}
        source = resolve(load(document), [s for s in sets if s.startswith("evaluation.source")]).evaluation.source
    if source.answer != source.solution:
        source = source.model_copy(update={"solution": ""})
    try:
        return open_source(source, setting="evaluation.source")
    except SourceError as error:
        if "is no file, folder" not in error.what:
            raise
        raise SourceError("is no benchmark, file, folder or kind of source", f"--source {spec}", near(spec)) from None


def _generated(uri: str) -> bool:
    """Whether a source generates problems without end."""
    return uri == "tiny-arithmetic" or uri.startswith(("reasoning-gym:", "tiny-worlds:"))


def check_problems(source: ProblemSet, number: int) -> None:
    """Raise SourceError, before an engine starts, when an interval has too few problems or no problem has an answer."""
    where, number = source.source.uri, min(len(source), number)
    if number < 2:
        raise SourceError(f"{number} problem is too few for an interval over problems", where, "2 at least are needed")
    rows = source.rows(range(number))
    if complete := [row for row in rows if row.reject is None]:
        if len(complete) < 2:
            why = next(row for row in rows if row.reject is not None).detail
            raise SourceError(f"only 1 of {len(rows)} problems can be asked ({why})", where, "2 at least are needed")
        return
    remedy = "Name the columns with --set evaluation.source.problem=... and --set evaluation.source.answer=..."
    raise SourceError(f"none of its {len(rows)} problems can be asked and graded: {rows[0].detail}", where, remedy)


def _slug(text: str) -> str:
    """A name for a folder: the benchmark, or the last part of a URI."""
    name = benchmark(text) or re.sub(r"\.(jsonl|ndjson|json|parquet|pq)(\.\w+)?$", "", text.rstrip("/").rpartition("/")[2])
    return re.sub(r"[^a-zA-Z0-9_.]+", "-", name).strip("-.")[:40] or "source"


# ---- results -----------------------------------------------------------------------------------------------------------


def is_missing(store: Store, one: Asked, number: int) -> bool:
    """Whether a shard of one policy on one source is missing or stale."""
    work = planned(store, one.run, one.kind, number, one.source)
    if work is None:
        return True
    rows = {shard: problems_digest(one.source.rows(list(indices))) for shard, indices in work.shards.items()}
    return not Inventory(work).is_fresh(*chain_of(work.run, EVALUATION), problems=rows)


def summarise(store: Store, one: Asked, found: dict[int, Samples]) -> dict[str, Any]:
    """The document summary.json: figures of every policy, their differences to the first policy, and the deciding settings.

    `found` has the samples by policy. Raises UserError when fewer than two problems were answered and graded.
    """
    first, *later = found
    try:
        policies = {
            str(number): {
                "figures": plain(figures(answered, one.k)),
                "verdicts": answered.verdicts,
                "rejected": answered.rejected,
                "verifier_gave_up": answered.gave_up,
            }
            for number, answered in found.items()
        }
        changes = [
            {"policy": number, "against": first, "figures": plain(paired(found[number], found[first], one.k))} for number in later
        ]
    except ValueError as error:
        raise UserError(str(error), store.locate(one.kind), "`reject_reason` in its shards says why") from error
    return {
        "source": one.run.source.model_dump(mode="json") | {"fingerprint": one.source.fingerprint},
        "problems": len(found[first]),
        "k": one.k,
        "samples": one.run.rollout.group_size,
        "interval": INTERVAL,
        "policies": policies,
        "differences": changes,
        "settings": _deciding(store, one, list(found)),
        "versions": versions(),
    }


def _deciding(store: Store, one: Asked, numbers: list[int]) -> dict[str, Any]:
    """The settings and facts of the engines that decided the figures of these policies."""
    run = one.run
    engines = [engine_facts(open_round(store, run, one.kind, number)) for number in numbers]
    return {
        **{name: getattr(run.rollout, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")},
        "seed": run.seed,
        "model": run.model.path,
        "revision": run.model.revision,
        "verifier": run.grade.verifier if run.grade.verdict_reward is None else f"reward {run.grade.verdict_reward}",
        "answer_pattern": run.grade.answer_pattern,
        "thinking": run.prompts.student_thinking,
        "template_hash": one.template,
        "prompt": run.prompts.student,
        **{name: ", ".join(sorted({e[name] for e in engines})) for name in engines[0]},
    }


def macro_mean(one: Asked, found: list[dict[int, Samples]]) -> dict[str, Any]:
    """Means over sources, with the same weight for each source, as plain JSON. `one` is any of the sources.

    found: for each source, its samples by policy.
    """
    first, *later = found[0]
    return {
        "sources": len(found),
        "k": one.k,
        "samples": one.run.rollout.group_size,
        "against": first,
        "policies": {n: plain(macro([(of[n], None) for of in found], one.k)) for n in found[0]},
        "differences": {n: plain(macro([(of[n], of[first]) for of in found], one.k)) for n in later},
    }
