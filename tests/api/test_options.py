"""What an LLM is made with is checked by every door, before a model is looked for."""

import inspect
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jpaged
from jpaged import LLM, AsyncLLM
from jpaged.llm import check_options
from jpaged.options import Options
from tests.helpers import ANY_KIND

TAKEN_KINDS = {  # of `ANY_KIND`, by those options that take any
    "model": {"none", "text"},
    "revision": {"none", "text"},
    "attention_backend": {"text"},  # which one there is depends on the device
    "num_blocks": {"none"},
    "memory_fraction": {"none"},
    "gpu_memory_utilization": {"none"},
    "swap_space": {"float"},
    "max_num_seqs": {"none"},
    "max_num_batched_tokens": {"none"},
    "max_model_len": {"none"},
    "enable_prefix_caching": {"flag"},
    "async_scheduling": {"flag"},
    "warm_up": {"flag"},
    "use_tqdm": {"flag"},
}
DOORS: dict[str, Callable[..., object]] = {
    "LLM": LLM,
    "AsyncLLM": AsyncLLM,
    "generate": lambda **options: jpaged.generate("a", **options),
}
SMALL = {"num_blocks": 31, "max_num_seqs": 2, "max_num_batched_tokens": 8, "warm_up": False}


@pytest.fixture
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a checkpoint fails the test."""
    monkeypatch.setattr("jpaged.loading.open_checkpoint", None)


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("kind", ANY_KIND)
@pytest.mark.parametrize("name", inspect.signature(LLM).parameters)
def test_an_option_of_the_wrong_type_is_refused_by_name(name: str, kind: str):
    if kind in TAKEN_KINDS.get(name, ()):
        check_options({name: ANY_KIND[kind]})
        return
    ranged = kind in ("nan", "float") or (name, kind) == ("dtype", "text")
    for door, make in DOORS.items():
        if door == "generate" and name == "seed":  # the sampling one, which may be None
            continue
        with pytest.raises((TypeError, ValueError) if ranged else TypeError, match=name):
            make(**{name: ANY_KIND[kind]})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"])
def test_a_dtype_may_be_jaxs_own(dtype: Any):
    defaults = {p.name: p.default for p in inspect.signature(LLM).parameters.values()}
    assert Options(**defaults | {"dtype": dtype}).dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'int8'"):
        check_options({"dtype": np.int8})


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 1}, "num_blocks must be at least 2, got 1"),
        ({"block_size": 12}, "block_size must be a power of two"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens must be at least 1"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"max_waiting": 0}, "max_waiting must be at least 1"),
        ({"memory_fraction": 0}, "memory_fraction must be above 0 and at most 1, got 0"),
        ({"memory_fraction": 10**400}, "memory_fraction must be finite"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization must be from 0.0 to 1.0"),
        ({"gpu_memory_utilization": 0.9, "memory_fraction": 0.9}, "two names of one option"),
        ({"dtype": "int4"}, r"dtype must be one of .*float32.*, got 'int4'"),
        ({"revision": "\ud800"}, "revision must be text that UTF-8 can write"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_before_a_model_is_looked_for(
    door: str, options: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        DOORS[door](**options)


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_refused(seed: int):
    with pytest.raises(ValueError, match="seed must be"):
        LLM(seed=seed)


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("prompts", [3, None, b"a", [], {"prompt": "a"}], ids=str)
def test_generate_refuses_what_is_no_prompt_before_a_model_is_looked_for(prompts: Any):
    with pytest.raises((TypeError, ValueError), match="prompt"):
        jpaged.generate(prompts)


def test_numbers_of_numpy_are_numbers(tiny_model_dir: pathlib.Path):
    options: dict[str, Any] = {
        "block_size": np.int64(8),
        "num_blocks": np.uint32(31),
        "memory_fraction": np.float32(0.5),
        "max_num_seqs": np.int8(2),
        "max_num_batched_tokens": np.int32(8),
        "max_model_len": np.int16(96),
        "seed": np.int64(-3),
    }
    with LLM(tiny_model_dir, **options, warm_up=False) as llm:
        (output,) = llm.generate([3, 4], use_tqdm=False)
        assert len(output.outputs[0].token_ids) > 0
        assert type(llm.engine.scheduler.config.max_model_len) is int


def test_a_refused_call_leaves_the_kept_model_where_it_is(tiny_model_dir: pathlib.Path):
    def kept() -> Any:
        return sys.modules["jpaged.generate"]._kept  # `jpaged.generate` is the function

    def generate(prompts: Any = "the fox", **changes: Any) -> Any:
        options = {"model": tiny_model_dir, "max_tokens": 3, **SMALL, **changes}
        return jpaged.generate(prompts, use_tqdm=False, seed=1, **options)

    first = generate()
    before = kept()
    bad: list[dict[str, Any]] = [
        {"num_blocks": "31"},
        {"num_blocks": np.array([31, 32])},
        {"dtype": None},
        {"model": 3},
        {"n": 0},
        {"prompts": None},
        {"prompts": "a\ud800"},
        {"blocks": 31},
    ]
    for changes in bad:
        with pytest.raises((TypeError, ValueError)):
            generate(**changes)
        assert kept() is before
    assert generate().outputs == first.outputs
    assert kept() is before
    jpaged.shutdown()
