"""What Transformers makes of the models that the tests run: the other side of every comparison."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from transformers.modeling_gguf_pytorch_utils import (  # pyright: ignore[reportMissingImports]
    load_gguf_checkpoint,
)

from tests.models.families import FAMILIES, seeded_tensor


class Greedy(NamedTuple):
    """A greedy continuation, and the logits after every token but the last, `[C, V]`."""

    tokens: list[int]
    logits: np.ndarray
    margins: list[float]  # between the two largest logits, at each generated token


def family_model(family: str) -> Any:
    """The family's tiny model with the weights of `seeded_tensor`."""
    raw = dict(FAMILIES[family])
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():  # tied ones once
        parameter.data = torch.from_numpy(seeded_tensor(name, tuple(parameter.shape)))
    model.tie_weights()
    return model


def tensor_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, by its name in a checkpoint."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def packaged_model(gguf: pathlib.Path) -> Any:
    """The model of a GGUF file as Transformers itself reads and dequantises it, in float32."""
    config = transformers.AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    # `from_pretrained` does the same, and asks for one more package.
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model


def greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> Greedy:
    """Continues the prompt with a cache, then takes all logits in one pass without one."""
    tokens, cache, last = list(prompt), None, list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            out = model(input_ids=torch.tensor([last]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            last = [int(out.logits[0, -1].argmax())]
            tokens += last
        logits = all_logits(model, tokens[:-1])
    top = np.sort(logits[len(prompt) - 1 :], axis=-1)[:, -2:]
    return Greedy(tokens[len(prompt) :], logits, (top[:, 1] - top[:, 0]).tolist())


def all_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """The logits after every token, in one pass."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()


def versions() -> Mapping[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}
