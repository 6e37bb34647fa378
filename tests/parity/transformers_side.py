"""What Transformers makes of the models that the tests run: the other side of every comparison."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from transformers.modeling_gguf_pytorch_utils import (  # pyright: ignore[reportMissingImports]
    load_gguf_checkpoint,
)
from transformers.modeling_outputs import (  # pyright: ignore[reportMissingImports]
    CausalLMOutputWithPast,
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
    tokens, cache, last = [], None, list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids = torch.tensor([last])
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            last = [int(out.logits[0, -1].argmax())]
            tokens += last
    return _greedy(model, prompt, tokens)


def greedy_together(
    model: Any, prompts: Sequence[Sequence[int]], num_tokens: int, *, at_once: int = 4
) -> list[Greedy]:
    """The same for many prompts, of which `generate` continues some at once, the quicker way."""
    config = transformers.GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    model.generation_config.eos_token_id = None  # which it would take where `config` has none
    found = []
    for first in range(0, len(prompts), at_once):
        group = prompts[first : first + at_once]
        longest = max(map(len, group))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in group])
        padding = torch.tensor([[longest - len(prompt)] for prompt in group])
        mask = (torch.arange(longest) >= padding).long()
        with torch.inference_mode():
            rows = model.generate(ids, attention_mask=mask, generation_config=config)
        continued = rows[:, longest:].tolist()
        found += [_greedy(model, *pair) for pair in zip(group, continued, strict=True)]
    return found


def _greedy(model: Any, prompt: Sequence[int], tokens: list[int]) -> Greedy:
    logits = all_logits(model, [*prompt, *tokens[:-1]])
    top = np.sort(logits[len(prompt) - 1 :], axis=-1)[:, -2:]
    return Greedy(tokens, logits, (top[:, 1] - top[:, 0]).tolist())


def all_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """The logits after every token, in one pass."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()


def versions() -> Mapping[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


class Beams(NamedTuple):
    """What a beam search returned, best first."""

    tokens: list[list[int]]  # generated; what ended a beam included, padding not
    scores: list[float]


def beam_search(
    model: Any,
    prompt: Sequence[int],
    *,
    beam_width: int,
    max_tokens: int,
    length_penalty: float,
    early_stopping: bool | str,
    end_ids: Sequence[int],
) -> Beams:
    """`generate(num_beams=beam_width)`; one beam too, which is else no beam search there."""
    config = transformers.GenerationConfig(
        num_beams=beam_width,
        num_return_sequences=beam_width,
        max_new_tokens=max_tokens,
        do_sample=False,
        length_penalty=length_penalty,
        early_stopping=early_stopping if beam_width > 1 else False,
        eos_token_id=list(end_ids) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with torch.inference_mode():
        ids = torch.tensor([list(prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    rows = out.sequences[:, len(prompt) :].tolist()
    if beam_width == 1:
        scores = [step[0] for step in out.scores]
        steps = zip(rows[0], scores, strict=True)
        total = sum(float(torch.log_softmax(s, -1)[token]) for token, s in steps)
        return Beams(rows, [total / len(rows[0]) ** length_penalty])
    lengths = (out.beam_indices >= 0).sum(dim=1).tolist()
    tokens = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    return Beams(tokens, out.sequences_scores.tolist())


class _TableConfig(transformers.PretrainedConfig):
    model_type = "table"


class TableModel(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A made-up language model: `logits(token ids)` says what comes behind them."""

    config_class = _TableConfig

    def __init__(self, logits: Callable[[list[int]], np.ndarray], vocab_size: int) -> None:
        sizes: dict[str, Any] = {"vocab_size": vocab_size, "num_hidden_layers": 1}
        super().__init__(_TableConfig(**sizes))
        self.table = logits
        self.unused = torch.nn.Parameter(torch.zeros(1))  # has a device, which is asked for

    # Of both, `generate` reads the names, and refuses what none of them takes.
    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:  # noqa: ARG002
        last = np.stack([self.table(row) for row in input_ids.tolist()])
        logits = torch.from_numpy(last)[:, None, :]
        return CausalLMOutputWithPast(logits=logits)

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any,
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Any]:
        return {"input_ids": input_ids}
