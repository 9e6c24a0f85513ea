"""Fixtures that tests share: a local Ray, a real engine with two random adapters, a tokenizer, a stored run, an object store."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # with tiny tensors a second thread slows two busy cores down
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's workers would give way to the tests of other processes. One that needs 3 s alone took 83 s beside two busy processes.
os.environ.setdefault("RAY_worker_niceness", "0")

import hypothesis
import pytest
from waiting import free_port, until

# A slow test on a busy machine is no failure. `make test` tries the same examples every time: it fails for a change alone.
SLOW = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("the same examples", derandomize=True, **SLOW)
hypothesis.settings.register_profile("random examples", **SLOW)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)

# A process of pytest-xdist takes one test file at a time, or all files that share one vLLM or forks of it (ENGINE).
# Files that take minutes begin first (LONGEST).
ENGINE = (
    *("test_engine", "test_tensor_parallel", "test_sweep", "test_report", "test_page", "test_page_moves", "test_page_audit"),
    *("test_collect", "test_reload", "test_teacher", "test_half_precision", "test_families", "test_doctor", "test_lora_support"),
)
LONGEST = (
    *("test_cluster", *ENGINE, "test_end_to_end", "test_damage", "test_object_store", "test_pool", "test_worker", "test_submit"),
    *("test_gpu_runner", "test_trackers", "test_distill", "test_comparison", "test_evaluate", "test_intervals"),
    *("test_audit_world", "test_gpu_check", "test_step_ranks", "test_export", "test_choose_gate", "test_answers_by_kind"),
    *("test_wheel", "test_evaluation", "test_resolve", "test_sandbox"),
    *("test_scale", "test_code", "test_fuzz", "test_schedule", "test_step", "test_driver", "test_cli", "test_nodes"),
    *("test_children", "test_distill_teachers", "test_imported", "test_whole", "test_keeper", "test_verifier"),
)


def pytest_configure(config):
    """Examples are random in `make chaos` alone."""
    hypothesis.settings.load_profile("random examples" if config.option.markexpr == "chaos" else "the same examples")


@pytest.hookimpl(tryfirst=True)  # before the tests of other marks are left out
def pytest_collection_modifyitems(config, items):
    """Let `make chaos` try random examples too. Order the tests in every pytest-xdist process in the same way, by `LONGEST`."""
    if config.option.markexpr == "chaos":
        for item in items:
            if hasattr(getattr(item, "obj", None), "hypothesis"):
                item.add_marker("chaos")
    if hasattr(config, "workerinput"):
        ranks = {name: rank for rank, name in enumerate(LONGEST)}
        items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run the tests of one file in one process, and all tests of the real engine in one process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            name = Path(nodeid.split("::", 1)[0]).stem
            return "engine" if name in ENGINE else name

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="session")
def ray_local():
    """A local Ray. Its logical CPUs exceed the cores, because with two of them stages and actors wait for each other forever.

    It has none of Ray's processes that nobody asks here: one looks through all logs, another would start machines, and others
    gather figures. They take 3 % of a core for as long as Ray lives.
    """
    import ray
    from ray._private.node import Node

    quick = {"prestart_worker_first_driver": False, "enable_metrics_collection": False}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("start_log_monitor", "start_monitor"):
            patch.setattr(Node, name, lambda _: None)
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, _system_config=quick)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def engine():
    """A real vLLM engine of the tiny reasoner in this process. It loads in about 14 s, so all tests share it."""
    from actors.inference.engine import Engine
    from pipeline import config

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the engine sets it; a Ray that a test starts later must not inherit that
        engine = Engine(config.Model(), config.Pool(threads=1), config.ScoreSettings())
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def vllm_forks():
    """Runs scripts in forks of a process that has imported vLLM. The import takes 9 s of a processor, so all scripts share it."""
    from forks import Forks

    forks = Forks("vllm")
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def egrsd():
    """Runs a command of the project to its end, as its user does: egrsd(*arguments, env=None) -> subprocess.CompletedProcess."""
    from forks import Forks

    forks = Forks("verbs")
    yield forks.egrsd
    forks.close()


@pytest.fixture(scope="session")
def chatml():
    """A tokenizer of single bytes, with a ChatML template that knows `enable_thinking`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


@contextlib.contextmanager
def given_back(prefix=""):
    """Leave the variables of the environment whose name begins with `prefix` as they were."""
    before = {name: value for name, value in os.environ.items() if name.startswith(prefix)}
    yield
    for name in [name for name in os.environ if name.startswith(prefix) and name not in before]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def environment():
    """Each test leaves the environment as it found it. The product sets variables itself, which no monkeypatch takes back."""
    with given_back():
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """Each test leaves torch its one thread. With two of them on busy cores, a later test took ten times as long."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="module", autouse=True)
def environment_of_ray():
    """Each file leaves Ray's variables so. A fixture of a file may run a verb, and the next file starts a cluster of its own."""
    with given_back("RAY_"):
        yield


@pytest.fixture(autouse=True)
def no_keeper(monkeypatch):
    """Verbs that a test calls in this process stay in it. Tests of the keeper start a process for each command."""
    monkeypatch.setattr("jobs.cli.keep", lambda *_: None)


@pytest.fixture(scope="module")
def signals_are_heard():
    """A suite that was started with `nohup` ignores SIGHUP, and one that a script put into the background ignores SIGINT.

    So do the processes that it starts.
    """
    heard = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, how) for number, how in heard.items()}
    yield
    for number, how in before.items():
        signal.signal(number, how)


@pytest.fixture
def trained_here(monkeypatch):
    """Train rounds in this process instead of in Ray Train's ranks.

    A test that sets another `fit` with its monkeypatch gives this one back, and then the real one: one place, one order.
    """
    import trainer_here

    from pipeline.training import worker

    monkeypatch.setattr(worker, "fit", trainer_here.fit)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Folders of two random LoRA adapters for the tiny reasoner, large enough to change every trace."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from pipeline import config
    from pipeline.models.resolve import asset_path

    settings, folders = config.Model(), []
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(asset_path(), dtype=torch.float32)
        lora = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(settings.lora_targets))
        student = get_peft_model(model, lora)
        noise = torch.Generator().manual_seed(seed)
        for name, weight in student.named_parameters():
            if "lora_" in name:
                weight.data.copy_(torch.randn(weight.shape, generator=noise) * 0.05)
        folder = tmp_path_factory.mktemp(f"adapter{seed}")
        student.save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="session")
def plain_table(adapters):
    """table(version, prompt, response) -> log-probs float64 [T, V] nats of transformers and peft in fp32.

    Version 0 is the tiny reasoner, and 1 and 2 have the adapters.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from pipeline.models.resolve import asset_path

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(asset_path(), dtype=torch.float32), adapters[0], "1")
    model.load_adapter(adapters[1], "2")
    model.eval()

    @torch.no_grad()
    def table(version, prompt, response):
        ids = torch.tensor([[*prompt, *response]])
        if version == 0:
            with model.disable_adapter():
                logits = model(ids).logits
        else:
            model.set_adapter(str(version))
            logits = model(ids).logits
        return logits[0, len(prompt) - 1 : -1].double().log_softmax(-1).numpy()

    return table


@pytest.fixture(scope="session")
def plain_forward(plain_table):
    """forward(version, prompt, response) -> log-probs [T] and entropies [T] nats of `plain_table`."""
    import numpy as np

    def forward(version, prompt, response):
        logprobs = plain_table(version, prompt, response)
        return logprobs[np.arange(len(response)), response], -(np.exp(logprobs) * logprobs).sum(-1)

    return forward


@pytest.fixture(scope="session")
def stored_run(engine, tmp_path_factory):
    """A run of two finished rounds of the tiny reasoner: real engine, stages and trainer, no Ray. Copy it to change it."""
    import torch
    from in_process import bring_up_to_date

    from pipeline import recipes
    from pipeline.overrides import resolve
    from pipeline.problems.sources import open_source
    from pipeline.rounds.inventory import commit_round
    from pipeline.rounds.metrics import summarise_round
    from pipeline.rounds.round import plan_round, with_engines
    from pipeline.stages import LABELS, MEASURE, STAGES
    from pipeline.store.directory import Store
    from pipeline.training import rank

    sets = [
        "rounds=2",
        "rollout.prompts_per_round=16",
        "score.rescore_share=0.2",
        "evaluation.problems=0",
        "train.batch_traces=64",
    ]
    store, run = Store(str(tmp_path_factory.mktemp("runs") / "stored")), resolve(recipes.demo(), sets)
    store.save_run(run, {})
    source, trainer = open_source(run.source), rank.resume(store, run, torch.device("cpu"))
    for number in range(run.rounds):
        work = with_engines(plan_round(store, run, "rounds", number, number, source), {"rollout": engine, "score": engine})
        seconds = {}
        for name in (*MEASURE, *LABELS):
            for shard, indices in work.shards.items():
                problems = source.rows(indices) if name == "prompts" else None
                entry, _ = bring_up_to_date(work, STAGES[name], shard, problems)
                seconds[name] = seconds.get(name, 0.0) + entry.seconds
        commit_round(work)
        assert rank.train_round(trainer, store, number)
        clock = {f"seconds_stage_{name}": value for name, value in seconds.items()}
        clock |= {"seconds_engines": seconds["rollout"] + seconds["score"], "seconds_round": sum(seconds.values()) + 1}
        store.write_metrics("round", number, [{"round": number, **summarise_round(work), **clock}])
    return store


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A client of a local S3 server. The environment has its endpoint and credentials, as a user would set them."""
    import boto3
    import botocore.config
    import botocore.exceptions

    port = free_port()
    with open(tmp_path_factory.mktemp("moto") / "log", "w") as said:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=said, stderr=said)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "an-access-key-id")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-access-key")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        client = boto3.client("s3", config=botocore.config.Config(retries={"total_max_attempts": 1}))

        def answers():
            with contextlib.suppress(botocore.exceptions.EndpointConnectionError):
                return client.create_bucket(Bucket="runs")

        until(answers, what="the object store answers")
        yield client
    server.kill()
    server.wait()
