"""A teacher at a server: bounds from its best tokens, exact entropies with our plugin, servers that do not fit or answer.

Servers that misbehave are played by a small HTTP server here. A real vLLM server answers in the test that is marked `chaos`.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from waiting import free_port, until

from actors.served import Served
from actors.server import TOKEN, Server
from pipeline import config
from pipeline.contract import Failure, Generate, Policy, Sampling, Score, Sequence
from pipeline.errors import EngineError, ModelError, SettingError, UserError
from pipeline.models.resolve import asset_path
from pipeline.models.tokenizers.tokenizer import tokenizer_of

VOCAB = 57
TINY = config.Model()


def logits(ids):
    """Log-probs float64 [n, V] of every place of a prompt, from a formula."""
    place, token = np.arange(len(ids))[:, None], np.arange(VOCAB)[None]
    raw = np.sin(1.0 + place * 3 + token * 7) * 3
    return raw - np.log(np.exp(raw).sum(1, keepdims=True))


class Played(BaseHTTPRequestHandler):
    """A server like vLLM's, with a fault by name in `server.fault`."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        models = {"data": [{"id": "teacher", "max_model_len": 64}]}
        self.reply(200, models if self.path == "/v1/models" else {"version": self.server.version})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, ids, k = self.server, asked["prompt"], asked.get("prompt_logprobs")
        with server.lock:
            server.at_once += 1
            server.most = max(server.most, server.at_once)
            server.asked += 1
            number = server.asked
        server.pause(number)
        with server.lock:
            server.at_once -= 1
        if server.fault == "busy" and number % 3:
            return self.reply(503, {"error": {"message": "try later"}}, **server.headers)
        if server.fault == "down":
            return self.reply(500, {"error": {"message": "the engine is dead"}})
        if server.fault == "a row" and 13 in ids:
            return self.reply(500, {"error": {"message": "not JSON compliant: nan"}})
        if server.fault == "token" and self.headers.get("Authorization") != "Bearer sesame":
            return self.reply(401, {"error": "Unauthorized"})
        if server.fault == "capped":
            text = f"Requested prompt logprobs of {k}, which is greater than max allowed: 5"
            return self.reply(400, {"error": {"message": text}})
        if k is None:
            server.writes = asked
            return self.reply(200, {"choices": [{"token_ids": [7, 8, 2], "finish_reason": "stop"}]})
        places = [None, *(self.place(row, token, k) for row, token in zip(logits(ids)[1:], ids[1:], strict=True))]
        return self.reply(200, {"choices": [{"prompt_logprobs": places[:-1] if server.fault == "short" else places}]})

    def place(self, row, token, k):
        order = np.argsort(-row)
        said = {}
        add = lambda key, value, rank: said.update({str(key): self.entry(key, value, rank)})  # noqa: E731
        plugin = self.server.fault in ("plugin", "lying plugin")
        add(token, row[token], 0 if plugin else int(np.flatnonzero(order == token)[0]) + 1)
        for rank, key in enumerate(order[: k - plugin], 1):
            add(key, row[key], rank)
        if plugin:
            last = order[k - 1] if order[k - 1] != token else order[k]
            add(last, -(np.exp(row) * row).sum() + (9 if self.server.fault == "lying plugin" else 0), k)
        return said

    def entry(self, key, value, rank):
        text = tokenizer_of(TINY).decode([int(key)])
        return {"logprob": float(value), "rank": rank, "decoded_token": "Q" if self.server.fault == "tokenizer" else text}

    def reply(self, code, document, **headers):
        data = json.dumps(document).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)


@pytest.fixture
def played():
    """A playing server. Its attribute `fault` says how it misbehaves."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Played)
    server.fault, server.pause, server.lock, server.at_once, server.most, server.asked = "", id, threading.Lock(), 0, 0, 0
    server.headers, server.version = {}, "9.9"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def client(server, keep=0, **more):
    port = server if isinstance(server, int) else server.server_address[1]
    teacher = config.Teacher(model="tiny-reasoner", server=f"http://127.0.0.1:{port}", **{"timeout_s": 20, "tries": 2, **more})
    return Served("big", teacher, TINY, config.Pool(), config.ScoreSettings(keep_topk=keep))


PROMPT, RESPONSE = [1, 9, 14, 30], [10, 21, 33, 2]


def expected():
    rows = logits(PROMPT + RESPONSE)[len(PROMPT) :]
    return rows[np.arange(4), RESPONSE], -(np.exp(rows) * rows).sum(1), rows


def test_bounds_hold_the_true_entropy_and_narrow_with_k(played):
    logprobs, entropy, _ = expected()
    widths = []
    for k in (3, 20, VOCAB):
        teacher = client(played, top_k=k)
        [score] = teacher.score([Sequence(PROMPT, RESPONSE)], Policy(0))
        assert teacher.facts().entropy_method == "bounds"
        assert teacher.facts().engine == "vllm 9.9, served"
        assert np.allclose(score.logprobs, logprobs, atol=1e-6)
        assert np.all(np.abs(score.entropy - entropy) <= score.entropy_error + 1e-6)
        widths.append(score.entropy_error)
    assert widths[0] > widths[1] > widths[2] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("keep", [0, 4])
def test_a_server_with_the_plugin_gives_exact_entropies_also_where_the_token_is_among_the_best(played, keep):
    played.fault = "plugin"
    teacher = client(played, keep=keep)
    assert teacher.facts().entropy_method == "exact"
    rows = logits(PROMPT + RESPONSE)[len(PROMPT) :]
    likely = [int(np.argsort(-row)[i]) for i, row in enumerate(rows)]  # the best token, the second best, ...
    for response in (RESPONSE, likely):
        [score] = teacher.score([Sequence(PROMPT, response)], Policy(0))
        assert np.allclose(score.logprobs, rows[np.arange(4), response], atol=1e-6)
        assert np.allclose(score.entropy, expected()[1], atol=1e-6)
        assert score.entropy_error == 0
        if keep:
            assert np.array_equal(score.topk_tokens, np.argsort(-rows, 1)[:, :keep])


def test_a_trace_that_the_server_writes_is_scored_by_it_too(played):
    [trace] = client(played).generate([Generate(PROMPT, 3)], Policy(0), Sampling(1.0, 1.0, 0, 8))
    assert (trace.tokens.tolist(), trace.finish_reason, trace.policy_version) == ([7, 8, 2], "stop", 0)
    assert len(trace.logprobs) == len(trace.entropy) == 3


def test_the_model_that_scores_is_the_one_that_writes_and_samples_as_this_project_does(played):
    """Without a name a vLLM writes with its base. What a request leaves out comes from the model's generation configuration."""
    client(played, served_model="teacher").generate([Generate(PROMPT, 3)], Policy(0), Sampling(0.5, 0.9, 7, 8))
    asked = {name: value for name, value in played.writes.items() if name != "prompt"}
    plain = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    chosen = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "max_tokens": 8}
    assert asked == {"model": "teacher", "return_token_ids": True, **plain, **chosen}


def test_sequences_that_cannot_be_scored_are_failures_of_their_row(played):
    teacher = client(played)
    found = teacher.score([Sequence(PROMPT, []), Sequence([3] * 70, [4]), Sequence(PROMPT, RESPONSE)], Policy(0))
    assert [type(answer) for answer in found] == [Failure, Failure, Score]
    assert found[1].cause == "prompt and response of 71 tokens exceed the window 63 of the teacher"


def test_a_row_at_which_a_server_fails_is_a_failure_and_a_server_that_fails_at_all_ends_the_run(played, monkeypatch):
    """A row of NaN gets 500 at every try. It ended the run, and every resume."""
    monkeypatch.setattr("actors.server.FIRST_WAIT_S", 0.0)
    asked = client(played)
    monkeypatch.setattr(asked, "_meet", lambda: (asked._served, asked._facts))  # all ids are in the handshake, 13 too
    played.fault = "a row"
    fine, broken = asked.score([Sequence([1, 2], [3, 4]), Sequence([1, 2], [13, 4])], Policy(0))
    assert fine.logprobs.shape == (2,)
    assert broken == Failure("the server fails at it: the server answered 500: not JSON compliant: nan, asked 2 times")
    monkeypatch.undo()
    monkeypatch.setattr("actors.server.FIRST_WAIT_S", 0.0)
    played.fault = "down"
    with pytest.raises(EngineError, match="the engine is dead"):
        asked.score([Sequence([1, 2], [3, 4])], Policy(0))


def test_requests_are_bounded_and_a_busy_server_is_asked_again(played, monkeypatch):
    monkeypatch.setattr("actors.server.FIRST_WAIT_S", 0.0)
    teacher, pair, begun = client(played, concurrency=2, tries=40), threading.Barrier(2), []

    def pause(number):
        begun.append(number)
        if len(begun) <= 2:  # whoever asked one after the other would wait here
            pair.wait(300)
        time.sleep(0.02)

    played.fault, played.most, played.pause = "busy", 0, pause
    assert all(isinstance(a, Score) for a in teacher.score([Sequence(PROMPT, RESPONSE)] * 4, Policy(0)))
    assert played.most == 2
    assert teacher.steps == 5  # four rows, and the handshake before them


@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize(("before", "after"), [("plugin", ""), ("", "plugin")])
def test_a_server_that_is_started_again_with_other_numbers_ends_the_run(played, monkeypatch, before, after, keep):
    """Without the plugin the log-prob of the best token stood for the entropy, and every entropy was 0."""
    played.fault = before
    teacher, methods = client(played, keep=keep), {"plugin": "exact", "": "bounds"}
    played.fault = after
    differ = f"its entropy_method is '{methods[after]}', the server's at the start '{methods[before]}'"
    for ask in (
        lambda: teacher.score([Sequence(PROMPT, RESPONSE)], Policy(0)),
        lambda: teacher.generate([Generate(PROMPT, 3)], Policy(0), Sampling(1.0, 1.0, 0, 8)),
    ):
        with pytest.raises(EngineError, match=rf"teachers.big, .*: the server has changed: {differ}\. Start it again as it was"):
            ask()
    monkeypatch.setattr(teacher, "_meet_again", lambda: None)  # it was started again just after the handshake
    said = {"": "an exact entropy is -.* nat, which is a log-prob", "plugin": "it gives exact entropies, and gave none"}[after]
    with pytest.raises(EngineError, match=f"the server has changed: {said}"):
        teacher.score([Sequence(PROMPT, RESPONSE)], Policy(0))


def test_a_server_that_is_started_again_as_it_was_goes_on(played):
    teacher = client(played)
    [first], [second] = (teacher.score([Sequence(PROMPT, RESPONSE)], Policy(0)) for _ in range(2))
    assert np.array_equal(first.entropy, second.entropy)
    played.version = "10.0"
    with pytest.raises(EngineError, match=r"its engine is 'vllm 10\.0, served', the server's at the start 'vllm 9\.9, served'"):
        teacher.score([Sequence(PROMPT, RESPONSE)], Policy(0))


@pytest.mark.parametrize(
    ("asked", "waits"),
    [("7", 7.0), ("600", 20.0), ("Fri, 01 Jan 2100 00:00:00 GMT", 20.0), ("Mon, 01 Jan 2001 00:00:00 GMT", 0.5), ("soon", 0.5)],
)
def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(played, monkeypatch, asked, waits):
    """But for no longer than `timeout_s`, 20 s, which is what a run waits for an answer."""
    waited = []
    monkeypatch.setattr("actors.server.FIRST_WAIT_S", 0.5)
    monkeypatch.setattr("actors.server.time", SimpleNamespace(sleep=waited.append, time=time.time))
    played.fault, played.asked, played.headers = "busy", 1, {"Retry_After": asked}
    where = f"http://127.0.0.1:{played.server_address[1]}"
    Server("big", config.Teacher(model="tiny-reasoner", server=where, timeout_s=20, tries=2)).post("/", {"prompt": [1]})
    assert [seconds for seconds in waited if seconds] == [waits]


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("down", EngineError, "the server answered 500: the engine is dead, asked 2 times. See whether it runs"),
        ("token", UserError, rf"wants another token \(401\)\. Set {TOKEN} in the environment of every node"),
        (
            "capped",
            SettingError,
            "fewer log-probs than 20: .*max allowed: 5. Start it with --max-logprobs 20, or",
        ),
        ("short", ModelError, "gave 47 positions for a prompt of 48 ids"),
        ("tokenizer", ModelError, "its tokenizer is not that of tiny-reasoner: id .* and at the server 'Q'"),
        ("lying plugin", EngineError, "outside the bounds that its own log-probs allow"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_in_one_line(played, monkeypatch, fault, error, said):
    monkeypatch.setattr("actors.server.FIRST_WAIT_S", 0.0)
    played.fault = fault
    with pytest.raises(error, match=said) as caught:
        client(played)
    assert "\n" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value) or error is SettingError


def test_the_token_comes_from_the_environment(played, monkeypatch):
    played.fault = "token"
    monkeypatch.setenv(f"{TOKEN}_BIG", "sesame")
    assert client(played).facts().vocab_size == VOCAB


def test_a_server_that_is_slow_or_gone_or_lacks_the_model_is_refused(played, monkeypatch):
    monkeypatch.setattr("actors.server.FIRST_WAIT_S", 0.0)
    with pytest.raises(ModelError, match=r"serve 'other'\. It serves: teacher\. Name one in teachers\.big\.served_model"):
        client(played, served_model="other")
    played.pause = lambda _: time.sleep(1.0)
    with pytest.raises(EngineError, match=r"gave no answer within 0\.2 s \(timeout_s\), asked once"):
        client(played, timeout_s=0.2, tries=1)
    with pytest.raises(EngineError, match=r"cannot be reached \(ConnectionError\), asked 2 times"):
        client(free_port())


@contextlib.contextmanager
def vllm_server(folder, *flags, **environment):
    """A real vLLM server of a model on loopback; yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "tiny"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "129", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--gpu-memory-utilization", "0.05", "--api-key", "sesame", *flags]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        **environment,
    }
    with subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            until(lambda: server.poll() is not None or answers(port), 300, "the vLLM server answers")
            assert server.poll() is None, "the vLLM server ended"
            yield port
        finally:
            server.terminate()


def answers(port):
    import requests

    with contextlib.suppress(requests.RequestException):
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200


@pytest.mark.engine
@pytest.mark.chaos
@pytest.mark.parametrize("served", ["", "served"])
def test_a_real_server_agrees_with_the_local_engine_on_the_same_tokens(engine, monkeypatch, served):
    monkeypatch.setenv(TOKEN, "sesame")
    prompts = [tokenizer_of(TINY)(text)["input_ids"] for text in ("7+4-3+9", "1+2-3+4")]
    sampling = Sampling(1.0, 1.0, 0, 40)
    traces = engine.generate([Generate(prompt, seed) for seed, prompt in enumerate(prompts * 8)], Policy(0), sampling)
    sequences = [Sequence(prompt, trace.tokens.tolist()) for prompt, trace in zip(prompts * 8, traces, strict=True)]
    here = engine.score(sequences, Policy(0))
    with vllm_server(asset_path(), "--max-logprobs", "40", EGRSD_EXACT_ENTROPY=served or "0") as port:
        teacher = client(port, keep=0, top_k=40)
        there = teacher.score(sequences, Policy(0))
        assert teacher.facts().entropy_method == ("exact" if served else "bounds")
        [written] = teacher.generate([Generate(prompts[0], 5)], Policy(0), sampling)
        assert written.tokens[-1] == 2
        with pytest.raises(SettingError, match="Start it with --max-logprobs 50"):
            client(port, top_k=50)
    for ours, theirs in zip(here, there, strict=True):
        assert np.abs(ours.logprobs - theirs.logprobs).max() < 1e-4
        assert np.all(np.abs(ours.entropy - theirs.entropy) <= theirs.entropy_error + 1e-4)
        assert theirs.entropy_error == 0 if served else theirs.entropy_error < 0.05
