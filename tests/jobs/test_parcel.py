"""What `submit` sends: the product, and what the settings name, from inside the folder."""

import re
from pathlib import Path

import pytest

from jobs import parcel
from jobs.parcel import collect
from pipeline.errors import SettingError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path):
    """A folder with a package, settings, data, a model and a place outside it."""
    folder = tmp_path / "project"
    for name in (
        *parcel.MARKS,
        "data/a.parquet",
        "data/b.parquet",
        "models/m/config.json",
        "held.jsonl",
        "notes.txt",
        "notes.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "mine.yaml").write_text("source: {uri: data/*.parquet}\nevaluation: {source: {uri: held.jsonl}}\n")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "private.jsonl").write_text("{}")
    return folder


def test_the_project_itself_goes_whole_and_alone():
    own = {
        path.relative_to(ROOT).as_posix()
        for package in parcel.PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }
    assert set(collect(ROOT, {"recipe": "demo"}, ()).files) == own | {"pyproject.toml"}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({}, set()),
        ({"config": "mine.yaml"}, {"mine.yaml", "data/a.parquet", "data/b.parquet", "held.jsonl"}),
        ({"recipe": "demo", "config": "mine.yaml", "set": ["model.path=models/m"]}, {"mine.yaml", "models/m/config.json"}),
        ({"set": ["source.uri=data"]}, {"data/a.parquet", "data/b.parquet"}),
        ({"source": ["held=held.jsonl"]}, {"held.jsonl"}),
        ({"source": "held.jsonl"}, {"held.jsonl"}),  # of `doctor`, which takes one: its "." sent the whole folder
        ({"source": "s3://bucket/data.parquet"}, set()),
        (
            {"set": ["source={uri: held.jsonl}", "evaluation={source: {uri: data}}"]},
            {"held.jsonl", "data/a.parquet", "data/b.parquet"},
        ),
        ({"set": ["grade.rewards=[{name: a, function: 'notes.py:f'}, {name: b, function: 'math:sin'}]"]}, {"notes.py"}),
        ({"set": ["teachers.big.model=models/m"]}, {"models/m/config.json"}),
        ({"set": ["source.pass_rates=/runs/before", "source.pass_rate=.1,.9"]}, set()),
        ({"set": ["label.gamma=0,.1,.3", "model.path=models/m"]}, {"models/m/config.json"}),
        ({"set": ["source.uri=/every/node/x.jsonl", "model.path=Qwen/Qwen3-8B"]}, set()),
    ],
)
def test_what_the_options_name_goes(project, asked, named):
    sent = set(collect(project, asked, ()).files)
    assert named <= sent
    assert "notes.txt" not in sent
    if "recipe" not in asked:
        assert sent == named | set(parcel.MARKS)


@pytest.mark.parametrize("name", ["data/link.parquet", "data/folder", "jobs/link.py"])
def test_a_link_that_leads_out_of_the_folder_is_refused(project, name):
    target = project.parent / "outside"
    (project / name).symlink_to(target if name.endswith("folder") else target / "private.jsonl")
    with pytest.raises(SettingError, match=rf"{name}.*: leads out of the folder that is sent, to .*outside"):
        collect(project, {"set": ["source.uri=data"]}, ())


@pytest.mark.parametrize(
    ("asked", "include", "message"),
    [
        ({"config": "yours.yaml"}, (), "no such file in the folder that is sent"),
        ({"config": "/etc/hosts"}, (), "no such file in the folder that is sent.*relative to --working-dir"),
        ({"set": ["source.uri=lost.jsonl"]}, (), "'lost.jsonl' is not in the folder"),
        ({"set": ["source.uri=../outside/private.jsonl"]}, (), "leads out of the folder"),
        ({"recipe": "demo", "set": ["label.gama=1"]}, (), "label.gama"),
        ({"set": ["source={uri: lost.jsonl}"]}, (), "source.uri: 'lost.jsonl' is not in the folder"),
        ({"set": ["source.uri=010.jsonl"]}, (), "'010.jsonl' is not in the folder"),
        ({"set": ["source.ury=x.jsonl"]}, (), "source.ury"),
        ({"set": ["grade.rewards=[{name: a, function: lost.py}]"]}, (), "grade.rewards.a: 'lost.py' is not in the folder"),
        ({"set": ["source.pass_rates=/a,runs/before"]}, (), "source.pass_rates: the run 'runs/before' is not sent with the job"),
        ({"recipe": "demo", "set": ["source.pass_rates=runs/b", "source.pass_rate=0,.9"]}, (), "source.pass_rates: the run"),
        ({}, ("nothing",), "'nothing' is not in the folder"),
        ({}, ("/etc/hosts",), "is not in the folder"),
    ],
)
def test_what_cannot_be_sent_is_told_before_anything_is(project, asked, include, message):
    with pytest.raises(SettingError, match=message):
        collect(project, asked, include)


def test_a_parcel_that_ray_would_refuse_names_its_largest_files(project, monkeypatch):
    monkeypatch.setattr(parcel, "MOST_BYTES", 5000)
    (project / "held.jsonl").write_bytes(b"x" * 6000)
    with pytest.raises(SettingError, match=r"more than Ray takes \(5 KiB\): held.jsonl \(6 KiB\)"):
        collect(project, {}, ("held.jsonl",))


def test_a_secret_is_sent_only_by_its_own_name(project):
    (project / "models/m/api_key.json").write_text("k")
    assert collect(project, {}, ("models/m",)).kept == ["models/m/api_key.json"]
    assert "models/m/api_key.json" in collect(project, {}, ("models/m/api_key.json",)).files


SECRETS = re.findall(
    r"\S+",
    """.env .env~ backup.env.old id_rsa id_ed25519.pub server.pem key.pem.bak a.key a.ppk a.p8 a.p12 .netrc _netrc hf_token.txt
    client_secret.json passwords.txt credentials.json wandb_api_key.txt api_key.json apikey.txt deploy_key rootkey.csv
    accessKeys.csv gcp-sa.json service-account.json key.json .s3cfg .boto rclone.conf .dockercfg .dockerconfigjson .vault_pass
    terraform.tfvars kubeconfig store.kdbx""",
)
A_MODEL = re.findall(
    r"\S+",
    """config.json generation_config.json model.safetensors model.safetensors.index.json tokenizer.json tokenizer_config.json
    special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.jinja keyed.json monkey.json""",
)


def test_names_of_secrets_stay_inside_a_named_folder_and_a_model_goes_whole(project):
    """Names that were sent, or kept, by mistake before."""
    for name in (*SECRETS, *A_MODEL):
        (project / "models/m" / name).write_text("x")
    found = collect(project, {"set": ["model.path=models/m"]}, ())
    assert {name.removeprefix("models/m/") for name in found.kept} == set(SECRETS)
    assert {name for name in found.files if name.startswith("models/")} == {f"models/m/{name}" for name in A_MODEL}


def test_a_folder_without_the_project_sends_the_packages_that_run_here(tmp_path):
    """Also one with a `jobs` of its own, as many projects have: a cluster ran `python -m jobs` of foreign code."""
    (tmp_path / "mine.yaml").write_text("rounds: 2\n")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "nightly.py").write_text("raise SystemExit(3)\n")
    sent = collect(tmp_path, {"config": "mine.yaml"}, [])
    assert {
        "jobs/cli.py",
        "pipeline/models/tiny_reasoner/model.safetensors",
        "actors/pool/pool.py",
        "mine.yaml",
    } <= sent.files.keys()
    assert not [name for name in sent.files if "__pycache__" in name or name.startswith(("tests/", "runs/"))]
    assert "jobs/nightly.py" not in sent.files
    sent.put(tmp_path / "job")
    assert (tmp_path / "job/jobs/cli.py").is_file()
