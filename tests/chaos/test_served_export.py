"""vLLM's own server, with nothing of this project, opens an exported policy and answers as transformers does."""

import json
import os
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

import pytest
import torch
from waiting import free_port, until

from jobs.cli import app

STORED = Path(__file__).parents[1] / "stored_run" / "group.tar.xz"
IDS = list(range(4, 40))
COMMON = "--dtype float32 --enforce-eager --max-model-len 128 --host 127.0.0.1 --gpu-memory-utilization 0.1"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The last policy of a stored run: its base, its adapter, its merged weights."""
    folder = tmp_path_factory.mktemp("exported")
    with tarfile.open(STORED) as archive:
        archive.extractall(folder, filter="data")
    for name, more in (("adapter", []), ("merged", ["--merge"])):
        app(["export", "--run", str(folder / "group"), "--model", str(folder / name), *more], standalone_mode=False)
    return folder


@torch.no_grad()
def expected(folder):
    """Log-probs of the ids under the merged weights, and the ids of a greedy answer, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    ids = torch.tensor([IDS])
    logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logprobs, model.generate(ids, do_sample=False, max_new_tokens=12)[0, len(IDS) :].tolist()


def asked(port, name, **more):
    document = {"model": name, "prompt": IDS, "temperature": 0.0, **more}
    data = json.dumps(document).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())["choices"][0]


@pytest.mark.engine
@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_the_server_of_vllm_answers_as_transformers_does(exported, tmp_path, form):
    port, folder = free_port(), exported / form
    base = json.loads((folder / "egrsd.json").read_text())["base"]
    adapter = f"--tokenizer {folder} --enable-lora --max-lora-rank 16 --lora-modules policy={folder}"
    model = f"--model {folder} --served-model-name policy" if form == "merged" else f"--model {base} {adapter}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *f"{COMMON} --port {port} {model}".split()]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    log = tmp_path / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=file, stderr=file)
        try:
            until(lambda: server.poll() is not None or "startup complete" in log.read_text(), 400, "the server is up")
            assert server.poll() is None, log.read_text()[-3000:]
            told = asked(port, "policy", max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
            answer = asked(port, "policy", max_tokens=12, return_token_ids=True)["token_ids"]
        finally:
            server.terminate()
            server.wait(60)
    logprobs, greedy = expected(exported)
    found = torch.tensor([told[place][str(IDS[place])]["logprob"] for place in range(1, len(IDS))])
    assert (found - logprobs).abs().max() < 1e-4
    assert answer == greedy[: len(answer)]
