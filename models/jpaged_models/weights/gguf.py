"""Checkpoints in one GGUF file, under Hugging Face's names."""

import pathlib
import re

import gguf
import numpy as np

from jpaged_models.config import ModelConfig
from jpaged_models.tokenizer import Tokenizer
from jpaged_models.weights.gguf_config import ROPE_FREQS, architecture_of, config_from_gguf
from jpaged_models.weights.gguf_file import GGUFFile
from jpaged_models.weights.gguf_tokenizer import has_vocabulary, tokenizer_from_gguf

LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
# Tables of RoPE: the config says what they say.
DERIVED = re.compile(rf"{re.escape(ROPE_FREQS)}|rope_factors_\w+\.weight|.*\.attn_rot_embd.*")
GPT2_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
LLAMA_ROTATED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")


class GGUFCheckpoint:
    """One GGUF file, checked at once and dequantised tensor by tensor to float32."""

    def __init__(self, path: pathlib.Path, *, source: str) -> None:
        self.source = source
        self._file: GGUFFile | None = GGUFFile(path)
        self._metadata = self._file.metadata
        self._architecture = architecture_of(self._file)
        self.config: ModelConfig = config_from_gguf(self._file)
        kinds = {tensor.kind for tensor in self._file.tensors.values()}
        _refuse_other_kinds(path, kinds)
        self._tokenizer: Tokenizer | None = None
        self._stored_names = _stored_names(self._file, self._architecture)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the file's metadata describes; None where it holds no vocabulary."""
        if self._tokenizer is None and has_vocabulary(self._metadata):
            self._tokenizer = tokenizer_from_gguf(self._metadata)
        return self._tokenizer

    def names(self) -> frozenset[str]:
        """The name of every tensor."""
        return frozenset(self._stored_names)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, in Hugging Face's layout."""
        if name not in self._stored_names:
            raise ValueError(f"{self.source} has no tensor {name!r}")
        if self._file is None:
            raise ValueError(f"{self.source} is closed")
        array = self._file.tensor(self._stored_names[name])
        if self._architecture == "gpt2" and GPT2_CONV1D.search(name):
            return array.T
        rotated = LLAMA_ROTATED.search(name) if self._architecture == "llama" else None
        if rotated is None:
            return array
        is_query = rotated.group(1) == "q"
        return _in_halves(array, self.config.num_heads if is_query else self.config.num_kv_heads)

    def close(self) -> None:
        """Lets go of the file."""
        self._file = None


def _refuse_other_kinds(path: pathlib.Path, kinds: set[gguf.GGMLQuantizationType]) -> None:
    """Dequantises one block of zeros of each kind, the only way to ask `gguf` what it can do."""
    for kind in kinds:
        _, type_size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, type_size), np.uint8), kind)
        except NotImplementedError as error:
            raise ValueError(f"{path}: quantisation {kind.name} is not supported") from error


def _stored_names(file: GGUFFile, architecture: str) -> dict[str, str]:
    """Hugging Face's name of each tensor -> the file's."""
    is_gpt2 = architecture == "gpt2"
    table = GPT2_NAMES if is_gpt2 else LLAMA_NAMES
    layers = "transformer.h" if is_gpt2 else "model.layers"
    stored: dict[str, str] = {}
    for name in file.tensors:
        if DERIVED.fullmatch(name):
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None or match.group(2) not in table:
            raise ValueError(
                f"{file.path}: tensor {name!r} has no place in a model of type {architecture}"
            )
        layer, stem, kind = match.groups()
        place = table[stem] if layer is None else f"{layers}.{layer}.{table[stem]}"
        stored[f"{place}.{kind}"] = name
    return stored


def _in_halves(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k back in Hugging Face's order: first the even, then the odd of each head.

    llama.cpp's `llama` rotates neighbours, Hugging Face rotates the two halves of a head.
    """
    size, *rest = array.shape
    pairs = array.reshape(num_heads, size // num_heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(array.shape)
