"""`egrsd audit` on a tiny world, whose true token classes are known."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audited_world import ENTROPY, GAIN, WORLD, answered_world, audited_world

from jobs import sweep
from jobs.audit import audit_run
from pipeline.audit import measure
from pipeline.audit import tokens as read
from pipeline.errors import StoreError, UserError
from pipeline.evidence import documents
from pipeline.evidence.sweep import first_step
from pipeline.evidence.sweep import read as read_stored
from pipeline.method import directions
from pipeline.method.relabel import Relabel
from pipeline.overrides import resolve
from pipeline.problems import worlds
from pipeline.report import collect
from pipeline.rounds.inventory import Inventory
from pipeline.rounds.round import open_round
from pipeline.rounds.rows import joined_round
from pipeline.stages import STAGES
from pipeline.store.directory import Store
from pipeline.store.manifest import Origin
from pipeline.training.batches import RaggedColumn, Traces

COLUMNS = ("alignment", "advantage_of_verdict", "block")
PAIRS = ((-1.0, -1 - math.log(8)), (-1 - math.log(2), -1.0), (1.0, 0.05))  # teacher, student, entropy


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """(store, document) of an audit of round 0."""
    store = audited_world(tmp_path_factory.mktemp("world") / "run")
    return store, store.read_json(documents.path_of(0, "json"))


@pytest.fixture(scope="module")
def whole(audited):
    """An audit of all traces of each block: its document, its table, and the gradients from which it was made."""
    work = open_round(audited[0], resolve(audited[0].load_run(), ["train.batch_traces=96"]), "rounds", 0)
    asked, seen = measure.objectives(work.run, ["grpo", "linear", "egrsd", "cl_egrsd", "fkl", "eopd"]), []
    of_parts = directions.Products.of_parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.maths.Products, "of_parts", lambda *parts: seen.append(parts) or of_parts(*parts))
        document, table = measure.measure(work, asked, measure.Plan(12, "adapter"))
    [parts] = seen
    return SimpleNamespace(document=document, table=table, parts=parts)


def test_every_token_has_its_true_class_and_the_dials_are_read_back(audited):
    store, document = audited
    by_class = document["classes"]["labels"]["by_class"]
    assert by_class["fork"]["tokens"] == 24 * 4 * 3 * 4
    assert by_class["other"]["tokens"] == 0
    for name in ("filler", "fork", "pivot", "style", "choice"):
        assert by_class[name]["entropy"] == pytest.approx(ENTROPY[name], abs=1e-5)
        assert by_class[name]["log_ratio"] == pytest.approx(GAIN.get(name, 0.0), abs=1e-5)
        assert by_class[name]["delta"] == pytest.approx(abs(GAIN.get(name, 0.0)), abs=1e-5)
    # of four fork letters the first three look at another one, and the last at "=": (3 x 1.7 + .01) / 4
    assert by_class["fork"]["lookahead"] == pytest.approx((3 * 1.7 + 0.01) / 4, abs=1e-5)
    table = pq.read_table(store.locate(documents.path_of(0, "parquet")))
    assert table["token_class"].combine_chunks().value_lengths().equals(table["alignment"].combine_chunks().value_lengths())


def test_evidence_of_other_traces_is_no_evidence_of_these(audited, tmp_path):
    """A trace_id stays when its trace is written again, so new tokens were tinted by the alignment of old ones."""
    store = Store(str(shutil.copytree(audited[0].uri, tmp_path / "run")))
    run = store.load_run()
    sweep.sweep_run(store.uri, ["label.gamma=.3"], None, 0, True)
    before = Inventory(open_round(store, run, "rounds", 0)).measured
    found = collect.collect(store, run)
    assert ([audit["round"] for audit in found["audits"]], found["sweep"] is None) == ([0], False)
    assert len(documents.read_alignment(store, 0, before)) == 96
    old = store.entry("rounds/0000", "grade", "0000")
    table = store.read(old)
    rows = table.to_pylist()
    rows[0]["reward"] += 0.25
    again = pa.Table.from_pylist(rows, schema=table.schema)
    store.commit("rounds/0000", STAGES["grade"], "0000", again, Origin(seconds=0.1, facts=old.facts))
    after = Inventory(open_round(store, run, "rounds", 0)).measured
    assert before != after
    found = collect.collect(store, run)
    assert (found["audits"], found["sweep"]) == ([], None)
    assert [note.split(":")[0] for note in found["notes"][-2:]] == ["The sweep is left out", "The audit of round 0 is left out"]
    assert documents.read_alignment(store, 0, after) == {}
    document = documents.read_audit(store, 0)
    assert not documents.is_of_now(document, {0: after})
    assert documents.is_of_now(document | {"measured": None}, {0: after})  # of an earlier version
    audit_run(store.uri, 0, ("grpo", [], (12, 12, "adapter")), True)  # a smaller one takes its place
    assert documents.read_audit(store, 0)["problems"] == 12


def test_traces_of_other_writers_tell_no_gradient_of_the_students_accuracy(audited, tmp_path):
    store = Store(str(shutil.copytree(audited[0].uri, tmp_path / "run")))
    old = store.entry("rounds/0000", "rollout", "0000")
    table = store.read(old)

    def written(writers):
        place = table.schema.get_field_index("trace_source")
        again = table.set_column(place, table.schema.field(place), pa.array(writers, pa.string()))
        store.commit("rounds/0000", STAGES["rollout"], "0000", again, Origin(seconds=0.1, facts=old.facts))
        return store

    half = ["student", "teacher"] * 48
    audit_run(written(half).uri, 0, ("grpo", [], (12, 0, "adapter")), True)
    assert documents.read_audit(store, 0)["traces"] == 48
    with pytest.raises(UserError, match="the student wrote no graded trace"):
        audit_run(written(["teacher"] * 96).uri, 0, ("grpo", [], (12, 0, "adapter")), True)


def test_a_script_gets_the_figures_and_the_sentences(audited, egrsd):
    """`result` was null after success. An audit of fewer traces, which is not kept, was nowhere."""
    options = ("--objectives", "cl_egrsd", "--blocks", "12", "--problems", "12", "--parameters", "adapter", "--verdict")
    done = egrsd("audit", audited[0].uri, *options, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert any(line.startswith("not kept") for line in document["messages"])
    assert document["result"]["problems"] == 12
    assert [point["name"] for point in document["result"]["points"]][1:3] == ["egrsd+off", "cl_egrsd"]
    assert (
        [line for line in document["messages"] if line in document["result"]["verdicts"]] == document["result"]["verdicts"] != []
    )


def test_a_problem_that_is_asked_twice_is_one_problem(tmp_path):
    """24 prompts of a file of 12 rows were told as 24 problems, and blocks that shared one as independent."""
    problems = [worlds.problem(index, 0, "train", WORLD) for index in range(12)]
    (tmp_path / "twelve.jsonl").write_text("\n".join(map(json.dumps, problems)), encoding="utf-8")
    store = answered_world(tmp_path / "run", f"source.uri={tmp_path / 'twelve.jsonl'}")
    audit_run(store.uri, 0, ("grpo", [], (12, 0, "adapter")), True)
    document = documents.read_audit(store, 0)
    assert (document["problems"], document["traces"], document["blocks"]) == (12, 96, 12)
    rows = joined_round(open_round(store, store.load_run(), "rounds", 0), ["trace_id", "problem"]).to_pylist()
    asked = {row["trace_id"]: row["problem"] for row in rows}
    table = pq.read_table(store.locate(documents.path_of(0, "parquet"))).to_pylist()
    assert len({(asked[row["trace_id"]], row["block"]) for row in table}) == 12


def test_problems_are_drawn_among_those_that_are_left(tmp_path):
    """A filled round leaves groups without signal out. Of 12 problems that were asked for, some had no trace."""
    store = answered_world(tmp_path / "run", "rollout.fill_groups=60")
    audit_run(store.uri, 0, ("grpo", [], (12, 12, "adapter")), True)
    document = documents.read_audit(store, 0)
    assert (document["problems"], document["traces"]) == (12, 48)


def test_a_round_without_right_traces_is_refused_before_a_gradient_is_made(tmp_path, monkeypatch):
    """It was audited to its end, and told dashes."""
    store = answered_world(tmp_path / "run", "grade.answer_pattern=(nothing)")
    monkeypatch.setattr(measure, "Directions", lambda *_: pytest.fail("gradients were made"))
    with pytest.raises(UserError, match=r"0 of 24 problems have both right and wrong traces, and 6 are needed.*sometimes"):
        audit_run(store.uri, 0, ("grpo", [], (12, 0, "adapter")), True)


def test_tenths_of_entropy_are_those_of_a_sweep(audited):
    """Tokens that share the least entropy were of a higher tenth in an audit, and the first tenths had none."""
    store, document = audited
    run, shares = store.load_run(), document["classes"]["decile"]["tokens"]
    tokens = Relabel(read_stored(run, [open_round(store, run, "rounds", 0)]).signals).deciles().tokens
    assert shares == pytest.approx(tokens / tokens.sum(), abs=1e-5)
    assert shares[0] >= document["classes"]["labels"]["by_class"]["filler"]["tokens"] / document["tokens"] - 1e-5


def test_regimes_are_scored_against_the_truth(audited):
    """W is 1: the label finds three of four fork letters, and calls the last one, before certain tokens, a pivot."""
    scored = audited[1]["classes"]["labels"]["regimes"]
    assert scored["fork"] == {"class": "fork", "precision": 1.0, "recall": 0.75}
    assert scored["pivot"] == {"class": "pivot", "precision": 0.0, "recall": 0.0}  # true pivots, at .5 nat, are `mid` here


def test_the_two_oracles_share_out_the_push_of_the_reference(audited):
    push = {point["name"]: point["push"]["value"] for point in audited[1]["points"] if point["push"]}
    assert push["reinforce"] == 1
    assert push["oracle"] + push["inverted_oracle"] == pytest.approx(1, abs=1e-4)


def test_the_reference_of_each_class_alone_shares_out_its_push(audited):
    """Which tokens' gradients point up: those of regimes and of tenths add up to the whole, and so do the shares."""
    classes = audited[1]["classes"]
    for kind in ("regime", "decile"):
        pushes = [point["push"]["value"] for point in classes["each"][kind]]
        assert sum(pushes) == pytest.approx(1, abs=1e-3)
        assert pushes == pytest.approx([part["value"] for part in classes[kind]["reinforce"]], abs=2e-3)


def test_what_points_where_is_seen_in_all_traces_and_norms_in_a_minibatch_of_each_block(audited, whole):
    """8 traces a block. With minibatches of 4 the norms come from half of them, and the push must not change with that."""
    document, found = audited[1], whole.document
    assert (document["traces_in_part"], found["traces_in_part"]) == (4, 8)
    pushes = {point["name"]: point["push"]["value"] for point in found["points"]}
    for point in document["points"]:
        assert pushes[point["name"]] == pytest.approx(point["push"]["value"], abs=2e-4)


def test_every_token_is_held_against_the_reference_of_the_other_blocks(whole):
    """Weight x alignment, summed over a block, is the product of the block's gradient with the mean of the others' references.

    All traces of a block are its part here, so gradients tell the same, for every weighting, and for a divergence too.
    """
    flows, references, towards = whole.parts
    others = (references.sum(0) - references) / 11
    np.testing.assert_allclose(towards, np.einsum("kmp,mp->km", flows, others), rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(flows[0], references, rtol=1e-3, atol=1e-6)
    pushed = np.zeros(12)
    for aligned, advantage, block in zip(*(whole.table[name].to_pylist() for name in COLUMNS), strict=True):
        pushed[block] += advantage * sum(aligned) / 8
    np.testing.assert_allclose(pushed * np.linalg.norm(references.mean(0)), towards[0], rtol=1e-3, atol=1e-6)


def test_weightings_that_no_run_trains_are_made_of_the_stored_signals(audited):
    """Advantage 2 and -1, delta ln 2 and -ln 8: the ratios are 2 and 8 (clipped to 3), and linear is 2 + 2 ln 2 and -1 - ln 8."""
    ragged = [RaggedColumn.of(pa.chunked_array([pa.array([[one], [other]], pa.list_(pa.float32()))])) for one, other in PAIRS]
    traces = Traces(0, np.array(["a", "b"]), ragged[0], ragged[0], *ragged, np.array([2.0, -1.0], np.float32), 0)
    tokens = read.Tokens(traces, np.array([0, 1]), np.zeros(2, int), np.ones(2, bool), [])
    found = {name: read.made(name, tokens).tolist() for name in read.MADE}
    assert found["linear"] == pytest.approx([2 + 2 * math.log(2), -1 - math.log(8)])
    assert found["clipped"] == pytest.approx([4, -3])
    assert (found["uncertain"], found["certain"]) == ([2, 0], [0, -1])


def test_all_traces_are_in_a_block(audited):
    """Blocks once held a minibatch of traces at most, and the rest of a wide round was counted and left out."""
    document = audited[1]
    assert document["blocks"] * document["traces_in_block"] == document["traces"] == 24 * 4


def test_the_step_is_the_rounds_own(audited):
    """rlsd changes over its first steps. A later round was weighed as if it were the first."""
    store, _ = audited
    work = open_round(store, store.load_run(), "rounds", 0)
    assert first_step(work) == 0
    for number, steps in ((0, (0, 1)), (1, (2, 3))):
        store.write_metrics("train", number, [{"round": number, "step": step} for step in steps])
    assert [first_step(replace(work, number=number)) for number in (0, 1, 2)] == [0, 2, 4]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"trace_id": ["a"]}, "holds no alignment"),
        ({"trace_id": ["a"], "alignment": [[float("nan")]]}, "must be finite"),
        ({"trace_id": ["a"], "alignment": ["x"]}, "holds no alignment|must be finite"),
        (None, "holds no alignment"),
    ],
)
def test_a_damaged_column_is_named(tmp_path, audited, table, message):
    store = type(audited[0])(str(tmp_path))
    sink = pa.BufferOutputStream()
    if table is not None:
        pq.write_table(pa.table(table), sink)
    store.write(documents.path_of(0, "parquet"), sink.getvalue().to_pybytes() + b"x" * (table is None))
    with pytest.raises(StoreError, match=f"{message}.*Delete the file and run"):
        documents.read_alignment(store, 0, "")


def test_the_column_is_read_back(audited):
    store, document = audited
    found = documents.read_alignment(store, 0, document["measured"])
    assert len(found) == document["traces"]
    assert sum(map(len, found.values())) == document["tokens"]
    assert any(np.abs(values).max() > 0 for values in found.values())
    assert documents.read_alignment(store, 1, "") == {}
