"""Make the tiny reasoner: a Qwen3-architecture model, supervised on wordy, fallible traces of the tiny task.

    python -m pipeline.models.warmstart --out DIR [--steps 900] [--seed 0] [--teacher] [--world forks=2,pivots=2]

Six in ten training traces answer the problem alone. Four in ten answer the problem with its reference solution in view. The same
weights are therefore a student that can improve, and a privileged teacher that is better. The loss covers every token after the
problem, those of the reference solution too.

With `--teacher` it makes a larger model with the same tokenizer, on traces of the same style with few errors left in them. That
model is a teacher that is better without any reference. With `--world` it learns a world with dials (problems/worlds.py).
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, get_cosine_schedule_with_warmup

from pipeline.errors import SettingError
from pipeline.problems import tiny, worlds

AIDED_SHARE = 0.4
BATCH = 64
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
MAX_NEW_TOKENS = 64
RECORD = "warmstart.json"
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_SYMBOLS = "0123456789+-*/=;#|?!.,:() \nabcdefghijklmnopqrstuvwxyz"
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('The tiny reasoner takes user and assistant messages only: leave prompts.system empty') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Scores:
    """Figures of one sampled response (temperature 1) to each held-out problem.

    accuracy: share of correct responses. mean_length: response tokens, with the end of sequence.
    """

    accuracy: float
    mean_length: float
    num_problems: int


@dataclass(frozen=True)
class Kind:
    """A model to make: its sizes, and the habits of the traces that it learns from, without and with the reference.

    world: the world of its problems, whose habits are then the world's. None: the tiny arithmetic task.
    pieces: parts of a batch, by length, that are computed one after the other; more of them have less padding.
    """

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    unaided: tiny.Habits
    aided: tiny.Habits
    world: worlds.World | None = None
    pieces: int = 1

    @property
    def answer_pattern(self) -> str:
        """What finds the answer in a response."""
        return tiny.ANSWER_PATTERN if self.world is None else worlds.ANSWER_PATTERN

    def problem(self, index: int, seed: int, split: str) -> dict[str, str]:
        """A problem of the task."""
        return tiny.problem(index, seed, split) if self.world is None else worlds.problem(index, seed, split, self.world)

    def trace(self, text: str, rng: random.Random, aided: bool) -> str:
        """A trace that the model learns from."""
        if self.world is None:
            return tiny.verbose_trace(text, rng, self.aided if aided else self.unaided)
        return worlds.trace(text, rng, self.world, self.world.aided if aided else self.world.unaided)


STUDENT = Kind(128, 384, 4, 2, tiny.UNAIDED, tiny.AIDED)
TEACHER = Kind(256, 768, 8, 4, tiny.CAREFUL, tiny.CAREFUL, pieces=4)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer with its chat template. It has 57 ids: one per symbol, pad, bos, eos, unk. It pads on the left."""
    vocabulary = {symbol: index for index, symbol in enumerate((*_SPECIAL, *_SYMBOLS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def build_model(seed: int, kind: Kind = STUDENT) -> Qwen3ForCausalLM:
    """An untrained model of 0.8 M parameters (TEACHER: 3.2 M), initialised from `seed`. Engines support its head of 32."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=kind.hidden,
        intermediate_size=kind.intermediate,
        num_hidden_layers=4,
        num_attention_heads=kind.heads,
        num_key_value_heads=kind.key_value_heads,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def prompt_text(tokenizer: PreTrainedTokenizerFast, item: dict[str, str], aided: bool) -> str:
    """The student's prompt, or (`aided`) the privileged one, inside the chat template."""
    content = (tiny.TEACHER_PROMPT if aided else tiny.STUDENT_PROMPT).format(**item)
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text


def training_batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int, kind: Kind = STUDENT
) -> tuple[Tensor, Tensor]:
    """`size` new traces -> ids and labels, each int64 [B, P + T], padded on the right. Labels are -100 on problem and padding."""
    rows, labels = [], []
    for _ in range(size):
        aided = rng.random() < AIDED_SHARE
        item = kind.problem(rng.randrange(1 << 30), 0, "train")
        trace = kind.trace(item["problem"], rng, aided)
        prompt = tokenizer(prompt_text(tokenizer, item, aided)).input_ids
        response = [*tokenizer(trace).input_ids, tokenizer.eos_token_id]
        # <bos> and the problem cannot be predicted. The reference solution behind them can, and is worth learning.
        given = 1 + len(item["problem"])
        rows.append(torch.tensor(prompt + response))
        labels.append(torch.tensor([-100] * given + prompt[given:] + response))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id), pad(labels, batch_first=True, padding_value=-100)


def gradients(model: Qwen3ForCausalLM, ids: Tensor, labels: Tensor, pieces: int) -> float:
    """Add the gradients of the mean loss over all labelled tokens, in `pieces` parts by length. Returns the loss in nats.

    ids, labels int64 [B, P + T], padded on the right. The parts give the gradients of the whole batch, up to rounding.
    """
    if pieces == 1:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        return loss.item()
    lengths, total, whole = (labels != -100).long().cumsum(1).argmax(1) + 1, int((labels != -100).sum()), 0.0
    for rows in lengths.argsort().chunk(pieces):
        part = labels[rows, : int(lengths[rows].max())]
        loss = model(input_ids=ids[rows, : part.shape[1]], labels=part).loss * ((part != -100).sum() / total)
        loss.backward()
        whole += loss.item()
    return whole


def train(model: Qwen3ForCausalLM, steps: int, seed: int, stop: int | None = None, kind: Kind = STUDENT) -> list[float]:
    """Train in place for `steps` optimiser steps, or for the first `stop` of them. Returns the loss of each step in nats.

    The learning rate rises linearly and then falls as a cosine to zero at `steps`. A stopped run equals the start of a full one.
    """
    tokenizer, rng = build_tokenizer(), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    losses = []
    model.train()
    for _ in track(range(stop or steps), description="warm start"):
        ids, labels = training_batch(tokenizer, rng, BATCH, kind)
        losses.append(gradients(model, ids, labels, kind.pieces))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def evaluate(model: Qwen3ForCausalLM, num_problems: int, aided: bool, seed: int = 0, kind: Kind = STUDENT) -> Scores:
    """Scores of one sampled response (temperature 1) to each of `num_problems` held-out problems, with or without reference."""
    tokenizer, correct, tokens, batch = build_tokenizer(), 0, 0, 256
    torch.manual_seed(seed)
    model.eval()
    for start in range(0, num_problems, batch):
        items = [kind.problem(i, seed, "test") for i in range(start, min(start + batch, num_problems))]
        inputs = tokenizer([prompt_text(tokenizer, item, aided) for item in items], padding=True, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(  # type: ignore[misc]
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=MAX_NEW_TOKENS,
            )[:, inputs.input_ids.shape[1] :]
        tokens += int((out != tokenizer.pad_token_id).sum())
        for item, text in zip(items, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
            answer = re.search(kind.answer_pattern, text)
            correct += answer is not None and answer[1] == item["answer"]
    return Scores(correct / num_problems, tokens / num_problems, num_problems)


def make(out: Path, steps: int, seed: int, num_problems: int = 1024, kind: Kind = STUDENT) -> dict[str, object]:
    """Train, round to bf16, evaluate the rounded weights and save a folder that transformers and vLLM open.

    Returns the record that is also written beside the weights: seed, steps, losses in nats, scores with and without reference.
    """
    model = build_model(seed, kind)
    losses = train(model, steps, seed, kind=kind)
    model.bfloat16()
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    model.save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    model.float()
    scores = {
        name: asdict(evaluate(model, num_problems, aided, kind=kind)) for name, aided in (("unaided", False), ("aided", True))
    }
    record = {"seed": seed, "steps": steps, "losses": [round(loss, 4) for loss in losses], **scores}
    (out / RECORD).write_text(json.dumps(record) + "\n")
    return record


def main(
    out: Annotated[Path, typer.Option(help="folder to write")],
    steps: Annotated[int, typer.Option(help="optimiser steps")] = 450,
    seed: Annotated[int, typer.Option(help="of initialisation and traces")] = 0,
    threads: Annotated[int, typer.Option(help="torch threads")] = 2,
    teacher: Annotated[bool, typer.Option("--teacher", help="a larger model on careful traces")] = False,
    world: Annotated[str | None, typer.Option(help="dials of a tiny world: forks=2,pivots=2,filler=3,style=0.5,early=0")] = None,
) -> None:
    """Make the tiny reasoner, a teacher of it, or the reasoner of a tiny world."""
    torch.set_num_threads(threads)
    kind = TEACHER if teacher else STUDENT
    try:
        kind = replace(kind, world=None if world is None else worlds.read_world(world))
    except SettingError as error:
        raise typer.BadParameter(f"{error}") from error
    record = make(out, steps, seed, kind=kind)
    for name in ("unaided", "aided"):
        typer.echo(f"{name}: {record[name]}")


if __name__ == "__main__":
    typer.run(main)
