"""What an LLM took of the device it gives back."""

import gc
import pathlib
from typing import Any

import jax
import pytest

from jpaged.llm import LLM
from jpaged.params import SamplingParams
from tests.models.tiny_files import llama_tensors, write_directory

OPTIONS: dict[str, Any] = {
    "num_blocks": 40,
    "block_size": 8,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
}
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture
def model_dir(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_directory(tmp_path / "tiny", llama_tensors())


def device_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_two_llms_one_after_the_other_leave_no_bytes_behind(model_dir: pathlib.Path):
    before, answers = device_bytes(), []
    for _ in range(2):
        with LLM(model_dir, **OPTIONS, warm_up=False) as llm:
            answers.append(llm.generate([[3, 1, 4], [1, 5]], GREEDY, use_tqdm=False))
            held = device_bytes()
            assert held > before + sum(leaf.nbytes for leaf in llm.engine.runner.pool)
        assert device_bytes() == before
    first, second = ([output.outputs for output in outputs] for outputs in answers)
    assert first == second


def test_closing_in_the_middle_of_a_stream_frees_everything_and_is_safe_to_repeat(
    model_dir: pathlib.Path,
):
    before = device_bytes()
    llm = LLM(model_dir, **OPTIONS, warm_up=False)
    stream = llm.stream([3, 1, 4], GREEDY)
    next(stream)
    llm.close()
    llm.close()
    assert device_bytes() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([3, 1, 4], GREEDY)
    assert llm.stats().blocks_used == 0


def test_an_interrupted_warm_up_leaves_no_bytes_behind(
    model_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = device_bytes()
    monkeypatch.setattr("jpaged.ahead.tqdm", interrupt)
    with pytest.raises(KeyboardInterrupt) as kept:  # and with it every frame of the call
        LLM(model_dir, **OPTIONS)
    assert kept.tb is not None
    assert device_bytes() == before


def test_a_model_that_cannot_be_loaded_leaves_no_bytes_behind(tmp_path: pathlib.Path):
    tensors = llama_tensors()
    del tensors["model.layers.1.mlp.down_proj.weight"]
    directory = write_directory(tmp_path / "torn", tensors)
    before = device_bytes()
    with pytest.raises(ValueError, match="down_proj"):
        LLM(directory, **OPTIONS, warm_up=False)
    assert device_bytes() == before
