"""Training: the same network as is served, a loss that falls, and a run that goes on."""

import dataclasses
import pathlib
import subprocess
import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import LLM
from jpaged_models import params_of, random_decoder
from jpaged_models.bpe import END, train_tokenizer
from jpaged_models.dense import dense_logits
from jpaged_models.llama import Llama
from jpaged_models.training import TrainConfig, held_out_loss, train
from tests.helpers import (
    TOLERANCES,
    assert_close,
    compile_quickly,
    make_engine,
    make_request,
    teacher_forced,
    tiny_config,
)

CONFIG = TrainConfig(steps=6, batch_size=3, seq_len=16, warmup_steps=2, save_every=3)
# A text with a rule that a small network finds: each number is the one before it and 3.
COUNTING = (np.arange(4000, dtype=np.int32) * 3) % 50


def model_of(**changes: object) -> Llama:
    return cast(Llama, random_decoder(tiny_config(**changes), dtype=jnp.float32, seed=1))


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "qk_norm": True}])
def test_the_dense_network_is_the_one_that_is_served(changes: dict):
    model = model_of(**changes)
    tokens = np.random.default_rng(0).integers(3, 53, (2, 21)).astype(np.int32)
    engine = compile_quickly(make_engine(model, max_num_seqs=2, max_model_len=64))
    requests = [make_request(text.tolist(), max_tokens=1) for text in tokens]
    found = dense_logits(model, jnp.asarray(tokens))
    for logits, expected in zip(found, teacher_forced(engine, requests), strict=True):
        assert_close(logits, expected, TOLERANCES["float32"].logits)


def test_sliding_windows_are_refused():
    with pytest.raises(ValueError, match="sliding windows are not supported here"):
        dense_logits(model_of(layer_windows=(None, 7)), jnp.zeros((1, 4), jnp.int32))


def test_the_loss_falls():
    model = model_of()
    before = held_out_loss(model, COUNTING[:500], 500, seq_len=16)
    config = TrainConfig(steps=60, batch_size=4, seq_len=16, learning_rate=1e-2, warmup_steps=5)
    losses = [loss for _, loss in train(model, COUNTING, config)]
    assert losses[-1] < 0.2 * losses[0]
    after = held_out_loss(model, COUNTING[:500], 500, seq_len=16)
    assert after.nats_per_token < 0.2 * before.nats_per_token
    assert after.bits_per_byte == pytest.approx(after.nats_per_token / np.log(2))


def test_a_run_that_was_stopped_goes_on_to_the_same_parameters(tmp_path: pathlib.Path):
    whole = model_of()
    numbers = [number for number, _ in train(whole, COUNTING, CONFIG)]
    assert numbers == [1, 2, 3, 4, 5, 6]
    stopped = model_of()
    for number, _ in train(stopped, COUNTING, CONFIG, folder=tmp_path):
        if number == 4:
            break
    again = model_of()
    numbers = [number for number, _ in train(again, COUNTING, CONFIG, folder=tmp_path)]
    assert numbers[0] in {2, 4}, "from the last state that was kept, not from the start"
    assert numbers[-1] == 6
    for one, other in zip(
        jax.tree.leaves(params_of(again)), jax.tree.leaves(params_of(whole)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_folder_goes_on_with_the_run_that_it_was_begun_with_alone(tmp_path: pathlib.Path):
    assert len(list(train(model_of(), COUNTING, CONFIG, folder=tmp_path))) == 6
    assert list(train(model_of(), COUNTING, CONFIG, folder=tmp_path)) == []
    longer = dataclasses.replace(CONFIG, steps=9)
    with pytest.raises(ValueError, match=r"begun with something else: steps was 6 and is 9; pass"):
        next(train(model_of(), COUNTING, longer, folder=tmp_path))
    with pytest.raises(ValueError, match=r"text was '4000 tokens, CRC \w+' and is '3999 tokens"):
        next(train(model_of(), COUNTING[1:], CONFIG, folder=tmp_path))
    with pytest.raises(ValueError, match=r"else: network\.qk_norm was False and is True; pass"):
        next(train(model_of(qk_norm=True), COUNTING, CONFIG, folder=tmp_path))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": -2}, "batch_size must be at least 1, got -2"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0, got nan"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, got 'int8'"),
    ],
)
def test_options_of_training_are_checked_when_they_are_given(wrong: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**{"steps": 3, **wrong})


def test_text_that_does_not_fit_the_network_is_refused_at_once():
    with pytest.raises(ValueError, match="more tokens than seq_len=16, got 16; give a longer text"):
        train(model_of(), COUNTING[:16], CONFIG)
    with pytest.raises(ValueError, match="token ids from 0 to 52, got 0 to 53; the tokenizer"):
        train(model_of(), np.arange(54, dtype=np.int32), CONFIG)
    with pytest.raises(ValueError, match="more tokens than seq_len=16, got 3"):
        held_out_loss(model_of(), COUNTING[:3], 3, seq_len=16)


def test_bfloat16_trains_too():
    model = model_of()
    config = TrainConfig(steps=30, batch_size=4, seq_len=16, learning_rate=1e-2, dtype="bfloat16")
    losses = [loss for _, loss in train(model, COUNTING, config)]
    assert losses[-1] < losses[0] - 0.5
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params_of(model)))


def test_a_vocabulary_has_room_for_every_byte():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257, .* got 256"):
        train_tokenizer(["a b"], vocab_size=256)


def test_a_tokenizer_gives_back_any_text():
    tokenizer = train_tokenizer(["In the beginning was the Word"] * 5, vocab_size=300)
    for text in ("In the beginning", "été 你好\n\t", "the Word was"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(END) == [0]
    assert tokenizer.eos_token_ids == (0,)


def test_the_command_trains_a_model_that_an_llm_serves(tmp_path: pathlib.Path):
    words = np.random.default_rng(0).choice(["sun", "moon", "sea", "and", "the", "rises."], 90_000)
    (tmp_path / "text.txt").write_text(" ".join(words))
    command = [sys.executable, "-m", "jpaged_models.train", str(tmp_path / "text.txt")]
    options = ["--out", str(tmp_path / "out"), "--steps", "2", "--batch-size", "1"]
    done = subprocess.run(
        [*command, *options, "--vocab-size", "300"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "held out: " in done.stdout
    again = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "model is there already; name another --out" in again.stderr
    with LLM(tmp_path / "out" / "model", warm_up=False, use_tqdm=False, num_blocks=9) as llm:
        (output,) = llm.generate("the sun", use_tqdm=False)
    assert output.finished


def test_too_little_text_is_refused(tmp_path: pathlib.Path):
    (tmp_path / "text.txt").write_text("short")
    command = [sys.executable, "-m", "jpaged_models.train", str(tmp_path / "text.txt")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "text.txt: expected at least 400,000 characters, got 5" in done.stderr
    assert not (tmp_path / "out").exists()
