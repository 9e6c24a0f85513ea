"""A settings file for somebody's own model and problems, written after a look at both and at this machine.

Every value that a look has chosen stands in the file with the reason as a comment. Nothing is guessed where columns could mean
two things: then the error lists the columns with an example of each.
"""

from __future__ import annotations

import contextlib
import json
import textwrap
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Model, Run, Source
from pipeline.errors import EgrsdError, SourceError
from pipeline.fit import footprint
from pipeline.fit.machine import GIB, Facts
from pipeline.models.resolve import open_model
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.overrides import read_section, resolve
from pipeline.problems.shape import ROLES
from pipeline.problems.sources import ProblemSet, open_source
from pipeline.stages.grade import check_references
from pipeline.stages.prompts import prompts
from pipeline.written import read_document, read_override

BOXED = "{problem}\n\nThink step by step, and put the final answer into \\boxed{}."
TEACHER = (
    BOXED + "\n\nA correct solution of this problem, for your eyes only:\n{solution}\n\nReach its answer by your own reasoning."
)
_BOX = (
    "; a small model may not keep to the box: then ask for one short sentence, and the last number counts "
    "(egrsd explain grade.fallback)"
)
_WIDEST = 110  # characters of a comment in a line
_LOOKED_AT, _MOST_COLUMNS = 512, 12
_HELD_OUT_SHARE = 0.2
_MOST_HELD_OUT = {False: 40, True: 500}  # held-out problems on a CPU, and on GPUs


@dataclass
class Draft:
    """A settings file in the making: nested values, and a comment for some dotted names. `notes` are told on the screen."""

    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any, comment: str = "") -> None:
        """Set one setting by its dotted name."""
        *sections, last = name.split(".")
        place = self.values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
        if comment:
            self.comments[name] = comment

    def text(self, head: list[str]) -> str:
        """The file as YAML, with comments on lines of their own."""
        lines = [f"# {line}" for line in head]
        for name, value in self.values.items():
            lines += (
                ["", *self._written(name, value, name, "")] if isinstance(value, dict) else self._written(name, value, name, "")
            )
        return "\n".join(lines) + "\n"

    def _written(self, key: str, value: Any, name: str, indent: str) -> list[str]:
        said = [f"{indent}# {line}" for line in textwrap.wrap(self.comments.get(name, ""), _WIDEST)]
        if isinstance(value, dict) and value:
            inner = [line for part, one in value.items() for line in self._written(part, one, f"{name}.{part}", f"{indent}  ")]
            return [*said, f"{indent}{key}:", *inner]
        return [*said, f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}"]


def draft(name: str, model: str, uri: str, sets: list[str], facts: Facts) -> Draft:
    """The settings of a run with this model on these problems, on a machine with these facts.

    `sets` decide before any look. Raises SourceError or ModelError when one of both cannot be read, or cannot be understood.
    """
    made = Draft()
    made.put("name", name)
    made.put("rounds", 1)  # its place in the file
    given = _nested(sets)
    base = read_section(Model, {"path": model} | given.get("model", {}), "model")
    source = read_section(Source, {"uri": uri} | given.get("source", {}), "source")
    problems = _opened(source)
    held_out = _put_source(made, problems, bool(facts.gpus))
    if "size" in made.values["source"]:  # rows are held out of those that `sets` ask for, and are none to train on
        given.get("source", {}).pop("size", None)
    size = footprint.measure(base)
    _put_model(made, base, size, facts)
    _put_prompts(made, problems)
    _merge(made.values, given)
    _put_lengths(made, problems, base, facts)
    _put_grade(made, problems)
    _put_work(made, problems, size, facts)
    _put_evaluation(made, held_out, facts)
    _merge(made.values, given)
    return made


def check(text: str, file: str) -> Run:
    """The run that a written file makes. Raises SettingError for one that does not fit together."""
    return resolve(Run(name=Path(file).stem), [], read_document(Run, text, file))


def _nested(sets: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for one in sets:
        _merge(values, read_override(Run, one))
    return values


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = deepcopy(value)


# ---- the source --------------------------------------------------------------------------------------------------------


def _opened(source: Source) -> ProblemSet:
    """The source. When its columns cannot be understood the error shows each column with an example."""
    try:
        return open_source(source)
    except SourceError as error:
        names = error.what.partition("there are: ")[2].split(", ")
        set_wrongly = any(f"no column '{getattr(source, role)}'" in error.what for role in source.model_fields_set & {*ROLES})
        if not names[0] or set_wrongly:
            raise
        shown = ", ".join(f"{name} ({_example(source, name)})" for name in names[:_MOST_COLUMNS])
        unclear = _unclear(source, names[0])
        holds = "columns hold problem and answer" if len(unclear) > 1 else f"column holds the {unclear[0]}"
        what = f"which {holds} is not clear. There are: {shown}"
        remedy = f"Say it with {' '.join(f'--set source.{role}=COLUMN' for role in unclear)}"
        if "solution" not in source.model_fields_set:
            remedy += ", and source.solution=COLUMN if there is one"
        raise SourceError(what, error.where, remedy) from error


def _unclear(source: Source, any_column: str) -> list[str]:
    """Which of problem and answer neither a setting nor a look finds. Each is tried with `any_column` in the other's place."""

    def is_found_without(other: str) -> bool:
        """Whether the source opens when the role `other` is given, so that the role in question is found by itself."""
        asked = source if other in source.model_fields_set else source.model_copy(update={other: any_column})
        with contextlib.suppress(SourceError):
            open_source(asked)
            return True
        return False

    unclear = [role for role, other in (("problem", "answer"), ("answer", "problem")) if not is_found_without(other)]
    return unclear or ["problem", "answer"]


def _example(source: Source, name: str) -> str:
    """The first cell of a column, cut. Empty where it cannot be read as text."""
    with contextlib.suppress(EgrsdError):
        asked = source.model_copy(update={"problem": name, "answer": name, "solution": ""})
        text = open_source(asked).rows([0], others=False)[0].answer or ""
        return repr(text if len(text) <= 40 else text[:37] + "...")
    return "no text"


def _put_source(made: Draft, problems: ProblemSet, on_gpu: bool) -> Source | None:
    """Write the source and its columns. Returns the source of held-out problems; None when there are too few."""
    source, shape = problems.source, problems.shape
    rows = problems.rows(range(min(_LOOKED_AT, len(problems))))
    first = next((row for row in rows if row.answer and row.problem), rows[0])
    made.put("source.uri", source.uri, f"{problems.total} rows")
    if source.split != "train":
        made.put("source.split", source.split)
    made.put("source.problem", shape.problem, f"such as {_cut(first.problem)}")
    made.put(
        "source.solution",
        shape.solution,
        f"such as {_cut(first.solution)}" if shape.solution else "none: the teacher sees the answer",
    )
    made.put("source.answer", shape.answer, f"such as {_cut(first.answer)}")
    made.notes += [f"found by looking: {text}" for text in shape.found]
    if source.options:
        made.put("source.options", source.options)
    held_out = _split_of(problems)
    if held_out is not None:
        return held_out
    size = len(problems)
    held = min(int(size * _HELD_OUT_SHARE), _MOST_HELD_OUT[on_gpu])
    if held < 2:
        made.notes.append("too few rows to hold some out: there is no evaluation before and after the run")
        return None
    made.put(
        "source.size",
        size - held,
        f"the last {held} rows are held out for the evaluation: shuffle a sorted file before the first run",
    )
    shaped = {"problem": shape.problem, "solution": shape.solution, "answer": shape.answer}
    return source.model_copy(update={"skip": source.skip + size - held, "size": held} | shaped)


def _split_of(problems: ProblemSet) -> Source | None:
    """The source of another split, where there is one."""
    source = problems.source
    for split in ("test", "validation"):
        with contextlib.suppress(EgrsdError):
            other = open_source(source.model_copy(update={"split": split}))
            if other.fingerprint != problems.fingerprint:
                shape = problems.shape
                return other.source.model_copy(
                    update={"problem": shape.problem, "solution": shape.solution, "answer": shape.answer}
                )
    return None


def _cut(text: str | None) -> str:
    """The beginning of a text on one line."""
    flat = " ".join((text or "").split())
    return repr(flat if len(flat) <= 72 else f"{flat[:69]}...")


# ---- model, prompts, lengths -------------------------------------------------------------------------------------------


def _put_model(made: Draft, model: Model, size: footprint.Size, facts: Facts) -> None:
    small = size.parameters < 20e6
    made.put("model.path", model.path, f"{size.parameters / 1e6:,.1f} M parameters, vocabulary of {size.vocab}")
    if small and not facts.gpus:
        made.put("model.dtype", "float32", "a small model on a CPU: the same seed gives the same traces")
    else:
        made.put("model.dtype", "bfloat16", "half the memory; only float32 on a CPU gives the same traces for the same seed")
    made.put("model.lora_rank", 16, "size of the adapter, a usual one; a larger one learns and takes more")
    made.put("model.lora_alpha", 32.0, "twice the rank: the scale of what the adapter adds")


def _put_prompts(made: Draft, problems: ProblemSet) -> None:
    """Write the templates. A source whose problems ask for a box, and a generated one, keeps its own words."""
    asks = _ask_for_box(problems)
    student = "{problem}" if asks else BOXED
    teacher = (
        TEACHER if problems.shape.solution else TEACHER.replace("{solution}", "{answer}").replace("solution of", "answer to")
    )
    made.put("prompts.student", student, "the model's chat template is put around these texts" + ("" if asks else _BOX))
    made.put(
        "prompts.teacher", teacher.replace(BOXED, "{problem}") if asks else teacher, "the teacher is the model before training"
    )


def _ask_for_box(problems: ProblemSet) -> bool:
    rows = problems.rows(range(min(_LOOKED_AT, len(problems))), others=False)
    return any("\\boxed" in (row.problem or "") for row in rows)


def _put_lengths(made: Draft, problems: ProblemSet, model: Model, facts: Facts) -> None:
    """Write the window and the longest response, from the lengths of real prompts and solutions in tokens."""
    tokenizer, limit = tokenizer_of(model), window(model)
    rows = [row for row in problems.rows(range(min(_LOOKED_AT, len(problems))), others=False) if row.problem]
    values = {name: made.values[name] for name in ("source", "prompts")}
    wide = [f"model.path={model.path}", f"model.max_model_len={limit}", "rollout.max_new_tokens=1", "evaluation.problems=0"]
    whole = resolve(Run(name="draft"), wide, values)
    table = prompts(rows, whole, tokenizer)
    found = [len(ids) for name in ("prompt_tokens", "teacher_prompt_tokens") for ids in table[name].to_pylist() if ids]
    longest = max(found, default=1)
    solutions = sorted(len(tokenizer(row.solution, add_special_tokens=False)["input_ids"]) for row in rows if row.solution)
    typical = solutions[int(0.95 * (len(solutions) - 1))] if solutions else 256
    most = 2048 if facts.gpus else 512
    new = min(most, max(128, _up(2 * typical, 32)), max(16, limit // 2))
    fits = min(limit, _up(longest + new + 1, 64))
    made.put(
        "model.max_model_len", fits, f"the longest of {len(rows)} prompts has {longest} tokens; the model's own window is {limit}"
    )
    said = f"95 % of the reference solutions have at most {typical} tokens" if solutions else "no reference solutions to go by"
    made.put("rollout.max_new_tokens", new, f"{said}; {_why(new, typical, most)}; a longer response counts as truncated")
    if longest + new > limit:
        made.notes.append(f"the longest prompts leave no room for a response of {new} tokens in {limit}: such rows are rejected")


def _why(new: int, typical: int, most: int) -> str:
    """Which of its bounds has made the longest response."""
    if new >= 2 * typical and new > 128:
        return "twice that"
    if new == 128:
        return "at least 128, since a model writes longer than a reference"
    return f"at most {most} on this machine" if new == most else "half of the model's window"


def window(model: Model) -> int:
    """Tokens that the model can see, by its configuration. Raises ModelError when it cannot be read."""
    from transformers import AutoConfig

    text = open_model(AutoConfig, model, "configuration").get_text_config()
    return int(getattr(text, "max_position_embeddings", 0) or 4096)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _put_grade(made: Draft, problems: ProblemSet) -> None:
    """Write the verifier: mathematics where the first answers can be read as such, else equal texts."""
    run = resolve(Run(name="draft"), ["evaluation.problems=0"], made.values)
    try:
        note = check_references(problems, run)
        made.put("grade.verifier", "math", "reads the last \\boxed{}, and compares as mathematics; `exact` compares texts")
        made.notes += [note] if note else []
    except SourceError:
        made.put("grade.verifier", "exact", "the answers are no mathematics: the text in the last \\boxed{} is compared")
    if _ask_for_box(problems):
        made.put("grade.fallback", "off", "the problems ask for a box themselves: an answer without one counts as none")
    made.put("grade.advantage", "group", "each answer is compared with the others to its problem")


# ---- work and machines -------------------------------------------------------------------------------------------------


def _put_work(made: Draft, problems: ProblemSet, size: footprint.Size, facts: Facts) -> None:
    rows = made.values["source"].get("size", len(problems))
    on_gpu, small = bool(facts.gpus), size.parameters < 5e8
    asked = min(32 if on_gpu else 8, rows)
    made.put("rounds", 50 if on_gpu else 4, f"with {asked} of {rows} problems a round; more rounds learn more")
    made.put("rollout.prompts_per_round", asked, "problems of one optimiser step; more of them make a step steadier and dearer")
    made.put("rollout.prompts_per_shard", min(4, asked), "the unit of work: what is lost when a process dies")
    made.put("rollout.group_size", 8, "answers to each problem; the reward is compared within them")
    made.put("objective.name", "cl_egrsd", "egrsd explain objective.name has the others")
    made.put("train.batch_traces", asked * 8, "one optimiser step a round")
    rate = "usual for adapters of models below 500 M parameters" if small else "usual for adapters of models of this size"
    made.put("train.learning_rate", 5e-4 if small else 1e-4, f"{rate}; lower it when accuracy falls from round to round")
    made.put("train.dtype", made.values["model"]["dtype"], "as the engines have it: then both give nearly the same log-probs")
    if on_gpu:
        _put_gpus(made, facts)
    else:
        _put_cpus(made, size, facts)


def _put_cpus(made: Draft, size: footprint.Size, facts: Facts) -> None:
    values = made.values["model"]
    model = Model(path=values["path"], dtype=values["dtype"], max_model_len=values["max_model_len"])
    trace, free = footprint.kv_bytes(model, size), facts.memory
    cache = max(0.25, min(round(0.2 * free / GIB * 4) / 4, _up(64 * trace, GIB // 4) / GIB), _up(trace, GIB // 4) / GIB)
    made.put("engines.rollout.threads", facts.cpus, f"this machine has {facts.cpus} CPUs and {free / GIB:.1f} GiB of free memory")
    made.put(
        "engines.rollout.kv_cache_gib", cache, f"{int(cache * GIB // trace)} traces of {model.max_model_len} tokens at one time"
    )
    made.put("engines.rollout.max_num_seqs", 64, SEQUENCES)
    made.put("train.threads", facts.cpus, "trainer and engine take turns on these CPUs")
    made.put("train.micro_batch_tokens", max(2048, values["max_model_len"]), MICRO)
    made.put("train.head_chunk_tokens", 256, "tokens whose logits over the whole vocabulary are in memory at one time")


SEQUENCES = "traces that an engine writes at one time, where its cache has room"
MICRO = "tokens of one forward and backward pass: lower it when the trainer's memory is short"


def _put_gpus(made: Draft, facts: Facts) -> None:
    cards = len(facts.gpus)
    said = f"{cards} x {facts.cards[0] if facts.cards else 'GPU'}"
    made.put("engines.rollout.enforce_eager", False, "CUDA graphs: a slower start, faster answers")
    made.put("engines.rollout.start_timeout_s", 1800, "seconds; a first start downloads the model, compiles and records graphs")
    made.put("engines.rollout.max_num_seqs", 64, SEQUENCES)
    made.put("train.gradient_checkpointing", True, "activations are computed twice, which saves most of their memory")
    made.put("train.micro_batch_tokens", max(8192, made.values["model"]["max_model_len"]), MICRO)
    if cards == 1:
        made.put("engines.rollout.colocate", True, f"{said}: engine and trainer take turns on it")
        made.put("engines.rollout.memory_share", 0.7, "share of the card's memory while the engine has its turn")
        made.put("engines.rollout.placement", {"cpus": 2, "gpus": 0.5}, "half a card for Ray: engine and trainer share one")
        made.put("train.placement", {"cpus": 2, "gpus": 0.5}, "the other half")
        made.put("train.offload", "optimizer", "the optimiser's state waits in main memory while the engine has its turn")
        return
    engines = cards // 2
    made.put("engines.rollout.min", engines, f"{said}: {engines} engines and {cards - engines} ranks of the trainer")
    made.put("engines.rollout.max", engines, "`egrsd scale` changes their number in a live run")
    made.put("engines.rollout.placement", {"cpus": 2, "gpus": 1}, "one card for each engine")
    made.put("train.workers", cards - engines, "one rank on each of the other cards")
    sharded = cards - engines > 1
    made.put(
        "train.strategy", "fsdp2" if sharded else "ddp", "weights are sharded over the ranks" if sharded else "there is one rank"
    )
    made.put("train.placement", {"cpus": 2, "gpus": 1}, "one card for each rank")


def _put_evaluation(made: Draft, held_out: Source | None, facts: Facts) -> None:
    """Write the held-out problems, which the run answers before its first and after its last round."""
    if held_out is None:
        made.put("evaluation.problems", 0, "no held-out problems: no figures before and after")
        return
    plain, values = Source().model_dump(mode="json"), held_out.model_dump(mode="json")
    for name, value in values.items():
        if value != plain[name] or name in ("uri", "problem", "answer"):
            made.put(f"evaluation.source.{name}", value)
    size = min(len(open_source(held_out).without_solutions()), _MOST_HELD_OUT[bool(facts.gpus)])
    made.put("evaluation.problems", size, "answered before the first round and after the last one")
    made.put("evaluation.max_new_tokens", made.values["rollout"]["max_new_tokens"], "as in the rounds, so that both compare")
