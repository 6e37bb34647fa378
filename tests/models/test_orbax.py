"""Checkpoints that Orbax keeps: what comes back, what is refused, and the one that comes along."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.convert import convert
from jpaged_models import (
    TINY,
    ModelConfig,
    RopeScaling,
    load_decoder,
    open_checkpoint,
    open_named_tensors,
    params_of,
    random_decoder,
    save_checkpoint,
)
from jpaged_models.bpe import train_tokenizer
from jpaged_models.chat_template import ChatTemplate
from jpaged_models.tokenizer import Tokenizer
from jpaged_models.weights import orbax
from jpaged_models.weights.checkpoint import TINY_DIRECTORY
from tests.helpers import tiny_config
from tests.models.tiny_files import llama_tensors, write_directory

SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "qkv_bias": True, "dtype": "bfloat16"},
    {"layer_windows": (None, 7), "qk_norm": True, "eos_token_ids": (2, 5)},
    {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64)},
    {"architecture": "GPT2LMHeadModel", "num_kv_heads": 6, "rope_theta": None, "head_size": 4}
    | {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "activation": "gelu_tanh"}
    | {"tie_word_embeddings": True},
]


def saved(folder: pathlib.Path, config: ModelConfig, tokenizer: Tokenizer | None = None) -> dict:
    params = params_of(random_decoder(config, dtype=config.dtype, seed=3))
    save_checkpoint(folder, params, config, tokenizer)
    return params


def assert_same(found: dict, expected: dict) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("changes", SHAPES)
def test_a_model_comes_back_as_it_was_saved(changes: dict, tmp_path: pathlib.Path):
    config = tiny_config(**changes)
    params = saved(tmp_path / "model", config)
    opened = open_checkpoint(tmp_path / "model")
    assert opened.config == config
    assert opened.tokenizer is None
    assert_same(params_of(load_decoder(opened, dtype=config.dtype)), params)


def test_parameters_are_cast_to_the_dtype_that_is_asked_for(tmp_path: pathlib.Path):
    params = saved(tmp_path / "model", tiny_config())
    found = params_of(load_decoder(open_checkpoint(tmp_path / "model"), dtype=jnp.bfloat16))
    assert_same(found, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    least=st.integers(1, 4000),
    most=st.integers(1, 20),
)
def test_parts_hold_every_parameter_once_and_no_more_than_their_room(sizes, least, most):
    specs: dict[orbax.Keys, Any] = {
        (str(i),): jax.ShapeDtypeStruct((size,), jnp.float32) for i, size in enumerate(sizes)
    }
    parts = [list(part) for part in orbax.parts(specs, least_bytes=least, most_parts=most)]
    assert sorted(keys for part in parts for keys in part) == sorted(specs)
    room = max(least, 4 * sum(sizes) // most)
    for part in parts:
        assert len(part) == 1 or 4 * sum(specs[keys].size for keys in part) <= room


def test_a_model_that_is_read_in_parts_is_whole(tmp_path, monkeypatch):
    params = saved(tmp_path / "model", tiny_config())
    monkeypatch.setattr(orbax, "PART_BYTES", 1)
    assert_same(
        params_of(load_decoder(open_checkpoint(tmp_path / "model"), dtype="float32")), params
    )


def test_a_copy_that_was_cut_short_is_refused(tmp_path: pathlib.Path):
    saved(tmp_path / "model", tiny_config())
    largest = max((tmp_path / "model" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    # In a process of its own: coroutines that Orbax leaves behind fail whichever test runs when
    # they are collected.
    load = (
        "from jpaged_models import load_decoder, open_checkpoint\n"
        "try: load_decoder(open_checkpoint('model'), dtype='float32')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", load],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"params cannot be read \(.*\); is the copy complete\?$", done.stdout.strip())


def test_a_tokenizer_with_its_templates_and_ends_goes_with_it(tmp_path: pathlib.Path):
    made = train_tokenizer(["to be or not to be, that is the question"] * 3, vocab_size=270)
    made.backend.add_special_tokens(["<s>", "<end>"])
    ids = [made.backend.token_to_id(token) or -1 for token in ("<s>", "<end>")]
    template = ChatTemplate(
        sources={"default": "{{ messages[0].content }}!", "tool_use": "tools"},
        special_tokens={"bos_token": "<s>"},
    )
    tokenizer = Tokenizer(
        backend=made.backend, bos_token_id=ids[0], eos_token_ids=(0, ids[1]), chat_template=template
    )
    config = tiny_config(vocab_size=tokenizer.vocab_size, bos_token_id=ids[0], eos_token_ids=(0,))
    saved(tmp_path / "model", config, tokenizer)
    found = open_checkpoint(tmp_path / "model").tokenizer
    assert found is not None
    for text in ("to be, or Not to be?\n", "é", "a<end>"):
        assert found.encode(text) == tokenizer.encode(text)
    assert (found.bos_token_id, found.eos_token_ids) == (ids[0], (0, ids[1]))
    assert found.chat_template is not None
    assert found.chat_template.sources == template.sources
    assert found.chat_template.render([{"role": "user", "content": "no"}]) == "no!"


def test_a_template_is_written_beside_the_others_or_not_at_all(tmp_path: pathlib.Path):
    made = train_tokenizer(["a b"], vocab_size=260)
    sources = {"default": "a", "../../evil": "b"}
    tokenizer = dataclasses.replace(made, chat_template=ChatTemplate(sources=sources))
    with pytest.raises(ValueError, match=r"name must be that of a file, got '\.\./\.\./evil'"):
        saved(tmp_path / "here" / "model", tiny_config(), tokenizer)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_nothing_is_written_over(tmp_path: pathlib.Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("")
    with pytest.raises(ValueError, match="model is not empty; name a directory that is not there"):
        saved(tmp_path / "model", tiny_config())
    with pytest.raises(ValueError, match="mine is a file; name a directory that is not there yet"):
        saved(tmp_path / "model" / "mine", tiny_config())
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine"]


def test_a_save_that_fails_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("planted")

    monkeypatch.setattr("jpaged_models.weights.orbax.save_tokenizer", fail)
    tokenizer = train_tokenizer(["a b"], vocab_size=260)
    with pytest.raises(OSError, match="planted"):
        saved(tmp_path / "model", tiny_config(), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_another_model_or_kind_is_refused(tmp_path: pathlib.Path):
    saved(tmp_path / "model", tiny_config())
    path = tmp_path / "model" / "jpaged.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"intermediate_size": 41}))
    with pytest.raises(ValueError, match=r"down.*of shape \(41, 24\), params has \(40, 24\); they"):
        load_decoder(open_checkpoint(tmp_path / "model"), dtype=jnp.float32)
    path.write_text(json.dumps(fields | {"num_layers": 1, "layer_windows": [None]}))
    with pytest.raises(ValueError, match=r"layers\.1\..* of shape None, params has"):
        load_decoder(open_checkpoint(tmp_path / "model"), dtype=jnp.float32)
    path.write_text(json.dumps(fields | {"sparkle": 1}))
    with pytest.raises(ValueError, match=r"jpaged\.json must have the fields architecture, .*save"):
        open_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="no tensors under Hugging Face's names; pass a directory"):
        open_named_tensors(TINY)


def test_what_tiny_and_dtypes_do_not_take_is_refused_before_anything_is_read(
    tmp_path: pathlib.Path,
):
    with pytest.raises(ValueError, match="revision is for hub ids; 'tiny' comes with jpaged"):
        open_checkpoint(TINY, revision="v2")
    with pytest.raises(ValueError, match=r"dtype must be one of auto, float32, .*, got 'int8'"):
        convert("nowhere", tmp_path / "dest", dtype="int8")


def test_convert_keeps_what_a_directory_of_hugging_faces_holds(tmp_path: pathlib.Path):
    source = write_directory(tmp_path / "source", llama_tensors(), torch_dtype="bfloat16")
    done = convert(source, tmp_path / "dest")
    assert done.dtype == "bfloat16"
    first, second = (open_checkpoint(tmp_path / name) for name in ("source", "dest"))
    assert second.config == first.config
    params = params_of(load_decoder(first, dtype=jnp.bfloat16))
    assert done.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert_same(params_of(load_decoder(second, dtype=jnp.bfloat16)), params)
    convert(tmp_path / "dest", tmp_path / "again", dtype="float32")
    assert open_checkpoint(tmp_path / "again").config.dtype == "float32"


def test_tiny_is_small_whole_and_names_no_folder_of_whoever_made_it():
    opened = open_checkpoint(TINY)
    assert opened.tokenizer is not None
    assert opened.tokenizer.vocab_size == opened.config.vocab_size
    files = [path for path in TINY_DIRECTORY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    for path in files:
        assert not re.search(rb"/(tmp|home|root|work|Users)/", path.read_bytes()), path.name


def test_a_copy_that_lacks_orbaxs_files_is_said_to_be_incomplete(tmp_path: pathlib.Path):
    saved(tmp_path / "model", tiny_config())
    for path in (tmp_path / "model" / "params").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(ValueError, match="is the copy complete"):
        load_decoder(open_checkpoint(tmp_path / "model"), dtype=jnp.float32)
