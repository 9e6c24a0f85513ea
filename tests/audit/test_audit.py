"""`egrsd audit` on a run of earlier code: figures, the stored column, and what is refused."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from jobs import audit as job
from pipeline.audit import figures, measure
from pipeline.errors import SettingError, UserError
from pipeline.evidence import documents
from pipeline.evidence.sweep import sampling_note
from pipeline.fit import footprint
from pipeline.method import directions
from pipeline.overrides import resolve
from pipeline.store.directory import Store
from pipeline.training.alignment import Directions
from pipeline.training.student import student

STORED = Path(__file__).parents[1] / "stored_run" / "group.tar.xz"
NAMES = "rlsd,grpo,cl_egrsd,cl_egrsd+cl_entropy+inverted"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    with tarfile.open(STORED) as archive:
        archive.extractall(folder, filter="data")
    return Store(str(folder / "group"))


def test_a_round_of_few_problems_is_refused(stored):
    with pytest.raises(UserError, match=r"4 problems are no 6 blocks.*Audit a larger round"):
        job.audit_run(stored.uri, 0, (NAMES, [], (6, 0, "adapter")), True)


def test_fewer_problems_than_blocks_are_the_mistake_of_the_option(stored, monkeypatch):
    """The model was built and all columns were read, and then a larger round was asked for."""
    monkeypatch.setattr(measure, "_trainer", lambda _: pytest.fail("the model was built"))
    with pytest.raises(SettingError, match=r"--problems: 4 problems are no 6 blocks.*Give 6 or more, or 0 for all"):
        job.audit_run(stored.uri, 0, (NAMES, [], (6, 4, "adapter")), True)


@pytest.mark.parametrize(
    ("room", "space", "remedy"),
    [
        (4 + 4, "weights", r"parameters for 4 objectives do not fit into .*Use --parameters adapter"),
        (4 + 2, "weights", r"Use --parameters adapter and 2 objectives at most"),
        (4 + 2, "adapter", r"Use 2 objectives at most"),
        (4, "adapter", r"At most .* M are audited: use a run with a smaller model.lora_rank"),
    ],
)
def test_gradients_that_do_not_fit_are_refused_before_the_model_is_built(stored, monkeypatch, room, space, remedy):
    """A remedy was named that was taken already: an adapter, and one objective. Memory is of `room` gradients by adapter."""
    model = stored.load_run().model
    numbers = footprint.measure(model).lora_width * model.lora_rank
    monkeypatch.setattr(measure, "LEAST_BLOCKS", 4)
    monkeypatch.setattr(measure, "MOST_BYTES", 4 * 4 * numbers * room)
    monkeypatch.setattr(measure, "_trainer", lambda _: pytest.fail("the model was built"))
    with pytest.raises(UserError, match=remedy):
        job.audit_run(stored.uri, 0, (NAMES, [], (6, 0, space)), True)


def test_the_configuration_tells_how_many_parameters_an_audit_moves(stored):
    """Room is computed from it before the model is there."""
    run = stored.load_run()
    model, size = student.build(run, torch.device("cpu")), footprint.measure(run.model)
    assert Directions(model, "adapter").size == size.lora_width * run.model.lora_rank
    assert Directions(model, "weights").size == size.parameters


def test_a_round_is_audited_and_every_token_gets_its_alignment(stored, capfd, monkeypatch):
    monkeypatch.setattr(measure, "LEAST_BLOCKS", 4)
    job.audit_run(stored.uri, 0, (NAMES, [], (6, 0, "adapter")), True)
    document = stored.read_json(documents.path_of(0, "json"))
    assert [point["name"] for point in document["points"]] == ["reinforce", *NAMES.split(",")]
    assert document["points"][0]["cosine"] is None  # four problems do not tell a direction, and nothing is made up
    shown = {"cosine", "minibatch", "share", "batch_share", "batch_cosine", "averaged_cosine", "push", "longer", "adamw"}
    assert document["points"][2]["difference"].keys() == shown
    table = pq.read_table(Path(stored.uri) / documents.path_of(0, "parquet"))
    assert table.num_rows == document["traces"]
    lengths = table["alignment"].combine_chunks().value_lengths().to_numpy()
    assert lengths.sum() == document["tokens"]
    assert np.isfinite(table["alignment"].combine_chunks().flatten().to_numpy()).all()
    assert set(table["block"].to_pylist()) == {0, 1, 2, 3}
    assert sum(document["classes"]["regime"]["tokens"]) == pytest.approx(1, abs=1e-5)
    assert documents.read_audit(stored, 1) is None
    shown = documents.read_audit(stored, 0)
    assert (shown["round"], len(shown["points"])) == (0, 5)
    assert "cosines ranked what training gained" in capfd.readouterr().out


def test_a_verdict_is_a_sentence_with_its_interval():
    """Only gated objectives get one. Three sentences widen each interval: t of 11 degrees at 1 - .025 / 3, over that at .975.

    An interval that then holds 0 tells nothing, and a figure that is not there says so.
    """
    wider = stats.t.ppf(1 - 0.025 / 3, 11) / stats.t.ppf(0.975, 11)
    assert wider == pytest.approx(1.28, abs=0.01)
    gaps = {"rlsd": (0.2, 0.1), "egrsd": (0.1, 0.05), "cl_egrsd": (-0.1, 0.09), "grpo+entropy": (0.1, 0.01)}
    points = [{"name": name, "difference": {}} for name in ("reinforce", job.UNGATED)]
    for name, (value, half) in gaps.items():
        points.append(
            {"name": name, "difference": {"averaged_cosine": {"value": value, "low": value - half, "high": value + half}}}
        )
    points.append({"name": "cl_egrsd+cl_entropy+inverted", "difference": {"averaged_cosine": None}})
    assert job.verdicts({"points": points, "blocks": 12}) == [
        "egrsd: the gate helps here, averaged cosine +0.100 [+0.036, +0.164] against the same without it",
        "cl_egrsd: the gate cannot be told apart from no gate here, averaged cosine -0.100 [-0.215, +0.015] against the same "
        "without it",
        "cl_egrsd+cl_entropy+inverted: these traces do not tell whether its gate helps",
        job.MEANING,
    ]


def test_a_smaller_audit_does_not_replace_a_larger_one(stored, capfd, monkeypatch):
    monkeypatch.setattr(measure, "LEAST_BLOCKS", 3)
    path = documents.path_of(0, "json")
    job.audit_run(stored.uri, 0, ("grpo", [], (6, 0, "adapter")), True)
    before = stored.read_bytes(path)
    job.audit_run(stored.uri, 0, ("grpo", [], (6, 3, "adapter")), True)
    assert stored.read_bytes(path) == before
    assert "not kept: round 0 has an audit of" in " ".join(capfd.readouterr().out.split())
    assert stored.read_json(path)["settings"]["grpo"]["name"] == "grpo"


def test_a_verdict_without_a_gate_and_open_sampling_are_said(stored, capfd):
    with pytest.raises(SettingError, match=r"--verdict is about a gate.*Name egrsd"):
        job.audit_run(stored.uri, 0, ("grpo,rlsd,egrsd+off", [], (6, 0, "adapter")), True, True)
    run = stored.load_run()
    assert sampling_note(resolve(run, ["rollout.top_p=1", "rollout.top_k=0", "rollout.temperature=1"])) is None
    assert "top-p 0.9, top-k off" in sampling_note(resolve(run, ["rollout.top_p=.9", "rollout.top_k=0"]))


def test_adamws_first_moment_has_the_noise_of_nineteen_minibatches():
    """With beta .9: (1 + .9) / (1 - .9) = 19. Noise is as large as the signal in a block, of as many traces as a minibatch."""
    rng = np.random.default_rng(0)
    flows = np.eye(2, 50)[:, None] + 0.1 * rng.standard_normal((2, 400, 50)) / np.sqrt(0.5)
    flows += np.eye(1, 50)
    lengths = directions.Products.of([flows[0], *flows])  # as if longer answers were the right ones
    [_, point] = figures.points(["reinforce", "x"], directions.Products.of(flows), (8.0, 8), 0.9, lengths)
    assert point["longer"] == point["cosine"]
    cosine, share = point["cosine"].value, point["share"].value
    assert share == pytest.approx(point["batch_share"].value)
    assert point["batch_cosine"].value == pytest.approx(cosine * np.sqrt(share))
    assert point["averaged_cosine"].value == pytest.approx(cosine * np.sqrt(1 / (1 + (1 / share - 1) / 19)))
    assert point["batch_cosine"].value + 0.05 < point["averaged_cosine"].value < cosine


@pytest.mark.parametrize(
    ("names", "space", "message"),
    [
        ("grpo,fkl", "weights", "score.keep_topk|teacher's distribution"),
        ("grpo,no_reference", "weights", "needs other scores"),
        ("grpo,nonsense", "weights", "unknown objective"),
        ("grpo", "everything", "no parameters.*weights or adapter"),
    ],
)
def test_what_cannot_be_audited_is_refused(stored, names, space, message):
    with pytest.raises(SettingError, match=message):
        job.audit_run(stored.uri, 0, (names, [], (6, 0, space)), True)


@pytest.mark.parametrize(
    ("names", "line", "message"),
    [
        (
            "egrsd",
            "objective.control=inverted",
            r"objective\.control: the name .* says this.*egrsd\+entropy\+inverted",
        ),
        ("egrsd", "objective.entropy=student", r"objective\.entropy: the name of an objective says this"),
        ("egrsd", "label.gamma=1", r"label\.gamma: an audit does not read this setting.*objective\.gamma"),
        ("egrsd", "rollout.top_p=.5", r"rollout\.top_p: an audit does not read this setting"),
        ("grpo", "objective.gamma=1", r"objective 'grpo' does not read this setting"),
    ],
)
def test_a_setting_without_effect_is_refused(stored, names, line, message):
    """An audit of `egrsd` with the inverted control showed the figures of the upright gate."""
    with pytest.raises(SettingError, match=message):
        job.audit_run(stored.uri, 0, (names, [line], (6, 0, "adapter")), True)


def test_an_oracle_wins_and_its_inverse_loses_by_the_differences_on_which_a_verdict_stands():
    """The gradient has a part of tokens that decide, which is steady, and a part of the others, of much noise and little else.

    The oracle keeps the first part, its inverse the second. Both differences from the whole lie outside their intervals.
    """
    rng, size = np.random.default_rng(4), 600
    up = np.eye(1, size)
    decide, others = (part * up + noise * rng.standard_normal((32, size)) for part, noise in ((1.0, 0.02), (0.3, 0.05)))
    flows = np.stack([decide + others, decide + others, decide, others])
    lengths = directions.Products.of([flows[0], *flows])
    names = ["reinforce", "grpo", "oracle", "inverted_oracle"]
    *_, oracle, inverse = figures.points(names, directions.Products.of(flows), (8.0, 8), 0.9, lengths)
    for figure in ("batch_cosine", "averaged_cosine"):
        assert oracle["difference"][figure].low > 0, figure
        assert inverse["difference"][figure].high < 0, figure


def test_a_setting_that_an_audit_reads_changes_its_objectives(stored):
    asked = measure.objectives(stored.load_run(), ["egrsd"], ["objective.gamma=.75", "train.threads=1", "profile.window=2"])
    assert asked["egrsd"].objective.gamma == 0.75


def test_a_round_whose_policy_was_trained_again_is_refused(stored, tmp_path, monkeypatch):
    """The gradients of the new policy on the traces of the old one were shown as those of "policy 1"."""
    monkeypatch.setattr(measure, "LEAST_BLOCKS", 4)
    store = Store(str(shutil.copytree(stored.uri, tmp_path / "run")))
    shutil.rmtree(tmp_path / "run" / "policy" / "0001")
    shutil.copytree(tmp_path / "run" / "policy" / "0002", tmp_path / "run" / "policy" / "0001")
    with pytest.raises(UserError, match=r"the policy that wrote this round was dropped .* or trained again.*Audit another"):
        job.audit_run(store.uri, 1, ("grpo", [], (6, 0, "adapter")), True)


def test_a_round_that_is_not_there_is_refused(stored):
    with pytest.raises(UserError, match="round 77"):
        job.audit_run(stored.uri, 77, ("grpo", [], (6, 0, "adapter")), True)
