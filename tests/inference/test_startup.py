"""What an engine sets before vLLM and torch are imported, read from a copy of the environment."""

from types import SimpleNamespace

import pytest

from actors.inference import startup
from pipeline import config


@pytest.fixture
def environment(monkeypatch):
    """The variables that an engine's process had from Ray, card 3 among them, and then has."""
    found = {"CUDA_VISIBLE_DEVICES": "3"}
    monkeypatch.setattr(startup, "os", SimpleNamespace(environ=found))
    return found


@pytest.mark.parametrize(
    ("gpus", "gpu_build", "seen"),
    [(0, False, ""), (0, True, "3"), (1, False, "3"), (0.5, True, "3")],
    ids=["the CPU build sees no card", "the GPU build has asked for one", "a card was asked for", "a shared card"],
)
def test_an_engine_sees_the_cards_that_ray_gave_it_and_no_other(environment, monkeypatch, gpus, gpu_build, seen):
    """Ray leaves all cards of a machine visible to an actor that asked for none."""
    monkeypatch.setattr(startup, "vllm_for_gpus", lambda: gpu_build)
    startup.set_environment(config.Pool(placement=config.Placement(gpus=gpus)), exact=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.parametrize(("value", "shown"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_a_person_who_writes_0_sees_no_log_of_vllm(environment, value, shown):
    environment.pop(startup.DEBUG, None)
    environment |= {} if value is None else {startup.DEBUG: value}
    assert startup.shows_log() is shown


def test_float32_stays_float32_in_tritons_kernels_unless_the_user_says_otherwise(environment):
    startup.set_environment(config.Pool(), exact=True)
    assert environment["TRITON_F32_DEFAULT"] == "ieee"
    environment["TRITON_F32_DEFAULT"] = "tf32"
    startup.set_environment(config.Pool(), exact=True)
    assert environment["TRITON_F32_DEFAULT"] == "tf32"


@pytest.mark.parametrize(
    ("capped", "chunked", "hybrid", "expected"),
    [
        (True, False, False, {"enable_prefix_caching": True, "block_size": 32}),
        (True, False, True, {"enable_prefix_caching": False}),  # vLLM would refuse to start
        (True, True, True, {"enable_prefix_caching": True}),
        (False, True, False, {"enable_prefix_caching": False}),
    ],
)
def test_prompts_are_shared_where_hits_are_capped_and_vllm_can_keep_a_models_states(capped, chunked, hybrid, expected):
    described = SimpleNamespace(is_hybrid=hybrid)
    engine_args = SimpleNamespace(enable_chunked_prefill=chunked, create_model_config=lambda: described)
    assert startup._prefix_cache(engine_args, capped) == expected
