"""The requests of the part `serving` through Transformers' continuous batching.

It has paged attention of PyTorch's own, or FlashAttention where that is installed; all else is its
choice, but for the tokens of a step: with masks made for every pair of tokens, fewer are faster.
"""

import importlib
import importlib.util
import time
from typing import Any

from benchmarks.gpu.serving import LOADS, Load, rates
from benchmarks.gpu.settings import Record, Settings, describe

MAX_BATCH_TOKENS = 2048
MODULES = ("torch", "transformers")


def run(settings: Settings, record: Record) -> None:
    """Records its rates, or why it has none: it is not ours, and fails nothing."""
    load = LOADS[settings.scale]
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        record("transformers", {"ok": True, "error": f"{', '.join(missing)} not installed"})
        return
    transformers = importlib.import_module("transformers")
    name = f"{load.name} transformers {transformers.__version__}"
    if not settings.lacks(name):
        return
    record.begin(name)
    try:
        arrivals, seconds = _serve(load, settings.seed)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is not ours
        record(name, {"ok": True, "error": describe(error)})
        return
    record(name, rates(arrivals, seconds))


def _serve(load: Load, seed: int) -> tuple[list[list[float]], float]:
    """Seconds from the first request to each one's tokens, and to the last."""
    manager_of = _model(load, seed).continuous_batching_context_manager
    transformers = importlib.import_module("transformers")
    config = importlib.import_module("transformers.generation.configuration_utils")
    hints = importlib.import_module("transformers.generation.continuous_batching.utils")
    options = {
        "generation_config": transformers.GenerationConfig(
            do_sample=False, max_new_tokens=load.max_tokens, eos_token_id=-1, pad_token_id=0
        ),
        "continuous_batching_config": config.ContinuousBatchingConfig(
            max_batch_tokens=MAX_BATCH_TOKENS
        ),
        "workload_hints": hints.WorkloadHints(
            max_prompt_length=load.prompt_len,
            max_generated_length=load.max_tokens,
            num_requests=load.requests,
        ),
    }
    with manager_of(**options) as manager:
        warm_up = [prompt[:17] for prompt in load.prompts(seed)]
        _answers(manager, warm_up, max_tokens=3, name="warm-up")
        start = time.perf_counter()
        outputs = _answers(manager, load.prompts(seed + 1), max_tokens=load.max_tokens, name="run")
        seconds = time.perf_counter() - start
    assert all(len(one.generated_tokens) == load.max_tokens for one in outputs), "one ended early"
    return [[stamp - start for stamp in one.timestamps] for one in outputs], seconds


def _model(load: Load, seed: int) -> Any:
    """Random weights, made on the device."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    fields = {key: value for key, value in load.config.items() if key != "architectures"}
    config = transformers.LlamaConfig(**fields)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval()


def _answers(manager: Any, prompts: list[list[int]], *, max_tokens: int, name: str) -> list[Any]:
    """All answers with their times, as they end."""
    manager.add_requests(inputs=prompts, max_new_tokens=max_tokens, record_timestamps=True)
    outputs: list[Any] = []
    while len(outputs) < len(prompts):
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
            if output.error is not None:
                raise RuntimeError(f"{name}: {output.error}")
            outputs.append(output)
        elif output is None and not manager.is_running():
            raise RuntimeError(f"{name}: its thread ended")
    return outputs
