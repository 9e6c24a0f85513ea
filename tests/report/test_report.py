"""The report without a browser: ledger, sample, pieces of tokens, and what leaves Python as one file."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from filled_runs import measured, planner_of, run_at
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import END, RIGHT_TO_LEFT, SCRIPT, byte_tokenizer, hostile_run, large_run, traces_of, unpack

from actors.fakes import UNWATCHED
from jobs import status
from jobs.export import export_run
from jobs.report import report_run
from jobs.verify import verify_run
from pipeline.choice.plans import told
from pipeline.config import Model
from pipeline.errors import StoreError, UserError
from pipeline.evidence.sweep import read_traces
from pipeline.models.resolve import asset_path
from pipeline.models.tokenizers.tokenizer import tokenizer_of
from pipeline.report import collect, figures, ledger, page
from pipeline.report.sampled import drawn, room, sample, tokens
from pipeline.rounds.inventory import Inventory, commit_round
from pipeline.rounds.round import open_rounds
from pipeline.rounds.rows import left_out
from pipeline.stages import STAGES
from pipeline.store.directory import Store
from pipeline.store.manifest import Origin
from pipeline.training import rank


def collected(store):
    """Everything the page shows of a run."""
    return collect.collect(store, store.load_run())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A hostile run and its texts."""
    return hostile_run(tmp_path_factory.mktemp("hostile"))


# ---- the ledger -----------------------------------------------------------------------------------------------------------


def counts(**changes):
    """A round that adds up, with changes."""
    rejected = {"rollout": Counter(engine_error=2), "grade": Counter(verifier_error=1), "score": Counter()}
    whole = {"planned": 4, "prompts": 4, "expected": 32, "traces": 32, "rejected": rejected, "fit": 29, "in_loss": 29}
    return ledger.Counts(**(whole | {"fit_tokens": 290, "tokens_in_loss": 290} | changes))


def test_a_ledger_that_adds_up_says_so():
    assert [check["ok"] for check in ledger.checks(counts())] == [True] * 5


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"prompts": 3}, 0),
        ({"traces": 31, "fit": 28, "in_loss": 28}, 1),
        ({"fit": 30, "in_loss": 30}, 2),
        ({"in_loss": 28}, 3),
        ({"tokens_in_loss": 289}, 4),
        ({"unused": 2, "unused_tokens": 20, "in_loss": 27, "tokens_in_loss": 271}, 4),
        ({"unused": 2, "unused_tokens": 20, "tokens_in_loss": 270}, 3),
    ],
)
def test_a_row_that_is_lost_anywhere_is_seen(changes, broken):
    assert [i for i, check in enumerate(ledger.checks(counts(**changes))) if check["ok"] is False] == [broken]


def test_what_is_not_done_yet_is_neither_right_nor_wrong():
    found = ledger.checks(counts(trained=False, in_loss=0, tokens_in_loss=0))
    assert [check["ok"] for check in found] == [True, True, True, None, None]


def test_rounds_add_up_to_the_run():
    whole = ledger.total([counts(), counts(left_out=1, in_loss=28)])
    assert (whole.traces, whole.fit, whole.left_out, whole.in_loss) == (64, 58, 1, 57)
    assert whole.rejected["rollout"] == Counter(engine_error=4)
    assert all(check["ok"] for check in ledger.checks(whole))


@pytest.mark.engine
def test_a_real_run_adds_up_and_a_lost_trace_is_told(stored_run, tmp_path):
    store = Store(str(shutil.copytree(stored_run.uri, tmp_path / "run")))
    whole = collected(store)
    assert whole["ledger"]["adds_up"]
    assert [c["ok"] for c in whole["ledger"]["total"]["checks"]] == [True] * 5
    assert whole["ledger"]["total"]["in_loss"] == 256
    rows = [row for row in store.metrics() if row["writer"] == "train" and row["round"] == 1]
    store.write_metrics("train", 1, [{k: v for k, v in row.items() if k != "writer"} for row in rows[:-1]])
    again = collected(store)
    assert not again["ledger"]["adds_up"]
    assert [c["ok"] for c in again["ledger"]["rounds"][1]["checks"]] == [True, True, True, False, False]


def test_groups_that_a_filled_round_leaves_out_are_told_and_the_ledger_adds_up(tmp_path, capfd):
    """Every trace is stored, graded and scored; training, `sweep`, `export` and `verify` see the same groups."""
    store, run = run_at(tmp_path / "run", "rollout.fill_groups=30", "rounds=1", *UNWATCHED)
    planner, trainer = planner_of(store, run), rank.resume(store, run, torch.device("cpu"))
    work = measured(planner, planner.plan(0, 0))
    commit_round(work, left_out(work))
    assert rank.train_round(trainer, store, 0)
    found = collected(store)
    total, asked = found["ledger"]["total"], sum(map(len, work.shards.values()))
    assert (total["traces"], total["in_loss"], total["unused"]) == (8 * asked, 4 * 8, 8 * asked - 4 * 8)
    assert [check["ok"] for check in total["checks"]] == [True] * 5
    assert found["notes"] == told(store, run)
    assert len(read_traces(work).trace_ids) == 4 * 8
    verify_run(store.uri, False)
    export_run(store.uri, str(tmp_path / "out"), False)
    status.show(store.uri, False)
    said = " ".join(capfd.readouterr().out.split())
    assert f"{8 * asked} traces of 1 rounds" in said
    assert f"1 rounds are filled: {asked - 4} further prompts were asked." in said
    ready = store.read_json("rounds/0000/ready.json")
    store.write_json("rounds/0000/ready.json", ready | {"left_out": {"0000": [0, 1]}})
    with pytest.raises(SystemExit, match="1"):
        verify_run(store.uri, False)
    assert "ready.json: left_out: are not the groups that the verdicts leave out" in "".join(capfd.readouterr())


@pytest.mark.engine
def test_figures_are_those_of_the_metrics(stored_run):
    found = collected(stored_run)["rounds"]
    known = [row for row in stored_run.metrics() if row["writer"] == "round"]
    for of, row in zip(found, known, strict=True):
        assert of["accuracy"] == pytest.approx(row["accuracy"])
        assert of["reward"] == pytest.approx(row["mean_reward"], rel=1e-5)
        assert of["length"] == pytest.approx(row["mean_length"])
        assert of["shares"] == pytest.approx([row[f"share_{n}"] for n in ("lock", "mid", "pivot", "fork")], abs=1e-6)
        assert of["lag"] == row["policy_lag"]
        assert of["trainer_gap"] < 1e-3


# ---- the sample -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 8), st.integers(1, 50)), min_size=1, max_size=80),
    st.integers(1, 60),
    st.integers(1, 400),
)
@settings(max_examples=100, deadline=None)
def test_a_sample_is_even_within_its_limits_and_does_not_depend_on_order(rows, most_traces, most_tokens):
    strata, counts, lengths = (np.array(column) for column in zip(*rows, strict=True))
    keys = np.array([f"{(i * 7919) % 1009:04d}" for i in range(len(rows))])
    limits = drawn.Limits(traces=most_traces, tokens=most_tokens)
    chosen = drawn.choose(strata, keys, counts, lengths, limits)
    assert len(chosen) >= 1
    assert len(chosen) == 1 or (counts[chosen].sum() <= most_traces and lengths[chosen].sum() <= most_tokens)
    order = np.random.default_rng(0).permutation(len(rows))
    again = drawn.choose(strata[order], keys[order], counts[order], lengths[order], limits)
    assert sorted(keys[order][again]) == sorted(keys[chosen])
    if lengths.sum() <= most_tokens and (counts == counts[0]).all():  # then only the number is limited
        taken = Counter(strata[chosen].tolist())
        found = Counter(strata.tolist())
        short = [taken[s] for s in found if taken[s] < found[s]]
        assert not short or max(taken.values()) - min(short) <= 1


def test_a_group_longer_than_the_limit_is_shown_when_there_is_no_other():
    one = (np.array([value]) for value in ("a", "k", 1, 10**6))
    assert drawn.choose(*one, drawn.Limits()).tolist() == [0]


def test_a_sample_holds_whole_groups_and_thins_only_those_of_more_than_a_quarter_of_the_limit(tmp_path):
    store = large_run(tmp_path, 400, per_round=200)  # 50 groups of 4 traces a round
    measured = [figures.measure(Inventory(work), []).labelled for work in open_rounds(store, store.load_run())]
    tokenizer = tokenizer_of(store.load_run().model)
    some = sample.sample(measured, tokenizer, drawn.Limits(traces=100))
    assert set(Counter(some["traces"]["group"]).values()) == {4}
    assert len(some["traces"]["id"]) == 100
    assert set(some["groups"]["round"]) == {0, 1}
    assert some["labelled_groups"] == 100
    thin = sample.sample(measured, tokenizer, drawn.Limits(tokens=300))  # a group has more than 75 tokens
    assert max(Counter(thin["traces"]["group"]).values()) < 4
    assert thin["shown_tokens"] <= 300
    assert sample.sample(measured, tokenizer, drawn.Limits(traces=100)) == some


def test_long_texts_share_what_room_there_is():
    assert room.room(["x" * 50_000] * 10, 4_000_000) == room.MOST_TEXT
    for text in ("x", "\u3042", '"'):  # in a block: 1, 3 and 2 bytes
        texts = [text * 20_000] * 600
        most = room.room(texts, 4_000_000)
        assert 100 <= most < room.MOST_TEXT
        assert sum(len(json.dumps(t[:most], ensure_ascii=False).encode()) for t in texts) <= 4_000_000


@pytest.mark.engine
def test_packed_signals_are_the_stored_ones_to_three_digits(stored_run):
    found = collected(stored_run)["sample"]
    rows = {}
    for number in range(2):
        for entry in stored_run.entries(f"rounds/{number:04d}", "score").values():
            rows |= {row["trace_id"]: row for row in stored_run.read(entry).to_pylist()}
    shown = traces_of(found)
    assert len(shown) == found["labelled"] == 256
    for trace in shown[::17]:
        assert np.allclose(trace["teacher"], rows[trace["id"]]["teacher_logprobs"], rtol=1e-3, atol=1e-7)
        words = ((found["vocabulary"][word], found["kinds"][word]) for word in trace["tokens"])
        assert "".join(t for t, kind in words if kind == "t") == trace["text"]


@pytest.mark.engine
def test_prompts_are_shown_as_the_models_saw_them(stored_run):
    found = collected(stored_run)["sample"]
    [entry, *_] = stored_run.entries("rounds/0000", "prompts").values()
    stored = {row["problem"]: row for row in stored_run.read(entry).to_pylist()}
    tokenizer = tokenizer_of(stored_run.load_run().model)
    seen = 0
    for block in found["blocks"]:
        head, numbers = unpack(block)
        for group in head["groups"]:
            if group["problem"] not in stored:
                continue
            for name in ("prompt", "teacher_prompt"):
                ids = stored[group["problem"]][f"{name}_tokens"]
                words = numbers["prompts"][group[name]["start"] :][: group[name]["shown"]]
                assert [found["vocabulary"][word] for word in words] == [piece.text for piece in tokens.pieces(tokenizer, ids)]
                assert group[name]["size"] == len(ids)
            seen += 1
    assert seen >= 8


# ---- tokens ---------------------------------------------------------------------------------------------------------------


def test_pieces_of_a_letter_are_shown_as_their_bytes(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    ids = tokenizer("né", add_special_tokens=False)["input_ids"]
    assert [tuple(piece) for piece in tokens.pieces(tokenizer, ids)] == [("n", "text"), ("C3", "bytes"), ("A9", "bytes")]


def test_special_and_unknown_ids_are_told(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    found = tokens.pieces(tokenizer, [tokenizer.eos_token_id, 10**6])
    assert [tuple(piece) for piece in found] == [("<eos>", "special"), ("id 1000000", "bytes")]


def test_the_tiny_reasoners_tokens_are_its_letters():
    tokenizer = tokenizer_of(Model(path=str(asset_path())))
    ids = tokenizer("7+4=11 a", add_special_tokens=False)["input_ids"]
    assert "".join(piece.text for piece in tokens.pieces(tokenizer, ids)) == "7+4=11 a"


# ---- the file -------------------------------------------------------------------------------------------------------------


def test_nothing_a_model_wrote_can_end_the_data_or_be_markup(hostile):
    store, texts = hostile
    report_run([store.uri], None, None, True)
    html = store.read_bytes("report.html").decode()
    assert SCRIPT not in html
    assert END not in html
    assert RIGHT_TO_LEFT not in html
    found = re.fullmatch(r'[\s\S]*<script type="application/json" id="data">([^<>&]*)</script>[\s\S]*', html)
    [document] = json.loads(found[1])["runs"]
    held = re.findall(r'<script type="text/plain" id="block-0-\d+">([A-Za-z0-9+/=]*)</script>', html)
    assert len(held) == document["sample"]["blocks"]
    by_text = {trace["text"] for block in held for trace in unpack(block)[0]["traces"]}
    assert by_text == {text[: room.MOST_TEXT] for text in texts[:7]}  # the eighth was rejected
    assert document["rejected"][0]["detail"] == f"died on {SCRIPT}"
    assert html.count("<script") == html.count("</script>") == 2 + len(held)


def test_entropies_that_are_bounds_against_the_settings_are_told_first(hostile, stored_run):
    [told] = collected(hostile[0])["warnings"]
    assert told.startswith(f"rounds/0000, 1 of 1 shards: entropies are bounds and not exact (not so {SCRIPT}).")
    assert collected(stored_run)["warnings"] == []


def test_the_page_names_what_may_run_by_hash_and_nothing_else(hostile):
    store, _ = hostile
    document = collect.collect_all([(store, store.load_run())])
    html = page.page(document).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"(src|href)=\"?(https?:)?//", html)
    assert "innerHTML" not in html
    assert page.page(document) == page.page(collect.collect_all([(store, store.load_run())]))
    served = page.page(document | {"live": True}).decode()
    assert "connect-src 'self'" in served
    assert "connect-src" not in html


def test_a_number_that_json_does_not_know_never_reaches_the_page():
    with pytest.raises(ValueError, match="Out of range"):
        page.embedded({"x": float("nan")})


@pytest.mark.parametrize(
    "document",
    [
        "[]",
        '{"points": [], "objectives": [[1]], "pairs": []}',
        '{"points": [], "objectives": [], "pairs": [{"objective": 1}]}',
        '{"points": [{}], "objectives": [], "pairs": []}',
        '{"points": 3, "objectives": 1, "pairs": 1}',
    ],
)
def test_a_comparison_that_is_none_is_told(tmp_path, document):
    (tmp_path / "compare.json").write_text(document)
    with pytest.raises(StoreError, match=r"compare\.json: .*Compare anew"):
        collect.read_comparison(Store(str(tmp_path)))


def test_a_run_that_is_not_labelled_has_a_report_without_traces(hostile, tmp_path):
    store = Store(str(shutil.copytree(hostile[0].uri, tmp_path / "run")))
    store.delete("rounds/0000/label")
    found = collected(store)
    assert found["sample"]["traces"] == {}
    assert found["rounds"][0]["accuracy"] is not None
    assert found["ledger"]["adds_up"]
    store.delete("rounds/0000/grade")
    with pytest.raises(UserError, match="nothing to report"):
        collected(store)


def test_the_alternatives_of_a_token_are_those_that_were_kept(hostile):
    store, _ = hostile
    found = collected(store)["sample"]
    table = store.read(store.entry("rounds/0000", "score", "0000"))
    tokenizer = tokenizer_of(store.load_run().model)
    shown = traces_of(found)
    assert all(trace["kept"] == 3 for trace in shown)
    trace = min(shown, key=lambda trace: trace["length"])
    row = table["trace_id"].to_pylist().index(trace["id"])
    ids = np.array(table["teacher_topk_tokens"][row].as_py())
    named = [found["vocabulary"][word] for word in trace["kept_tokens"]]
    assert named == [piece.text for piece in tokens.pieces(tokenizer, ids.ravel().tolist())]
    logprobs = np.ravel(table["teacher_topk_logprobs"][row].as_py())
    np.testing.assert_allclose(trace["kept_probs"], np.exp(logprobs), atol=1e-3, rtol=1e-3)


def test_shards_that_are_newer_than_the_training_are_no_lost_row(tmp_path):
    """A round that is graded again after it was trained on has other rows than the trainer saw: that is stale, and not a loss."""
    store, _ = hostile_run(tmp_path)
    entries = {name: store.entry("rounds/0000", name, "0000").sha256 for name in ("prompts", "rollout", "grade", "score")}
    store.write_json("rounds/0000/ready.json", {"policy": 0, "shards": {"0000": entries}})
    assert collected(store)["ledger"]["total"]["current"]
    old = store.entry("rounds/0000", "grade", "0000")
    rows = store.read(old).to_pylist()
    rows[0] |= {"reject_reason": "verifier_error", "verdict": None, "reward": None, "advantage": None}
    again = pa.Table.from_pylist(rows, schema=store.read(old).schema)
    store.commit("rounds/0000", STAGES["grade"], "0000", again, Origin(seconds=0.1, facts=old.facts))
    found = collected(store)
    assert found["ledger"]["adds_up"]
    assert not found["ledger"]["total"]["current"]
    assert [check["ok"] for check in found["ledger"]["total"]["checks"]] == [True, True, True, None, None]
    assert any("computed again" in sentence["text"] for sentence in found["story"])


def test_a_page_of_the_largest_sample_stays_below_its_cap(tmp_path):
    """Noise does not compress, so no page of these limits is larger. A tenth of the limits gives a tenth of the page."""
    store = large_run(tmp_path, 1000)
    run = store.load_run()
    limits = drawn.Limits().shared(10)
    document = collect.collect_all([(store, run)]) | {"runs": [collect.collect(store, run, limits)]}
    taken = document["runs"][0]["sample"]
    size = len(page.page(document)) - len(page.page(collect.waiting([(store, run)], "")))
    assert taken["shown_tokens"] > 0.7 * limits.tokens
    assert size < drawn.MOST_PAGE / 10
