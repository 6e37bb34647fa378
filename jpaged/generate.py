"""`jpaged.generate`: text from a prompt in one call, keeping the model for the next."""

import dataclasses
import inspect
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jpaged.llm import LLM

_kept: "tuple[Any, LLM] | None" = None  # the one LLM, and the (model, options) it was made for


def generate(
    prompts: Any,
    *,
    model: str | os.PathLike | None = None,
    use_tqdm: bool = True,
    **options: Any,
) -> Any:
    """A `RequestOutput` for one prompt, a list of them for a list of prompts.

    Args:
        prompts: text, a list of token ids, or a list of either.
        model: as `LLM` takes it; by default SmolLM2-135M-Instruct.
        use_tqdm: whether to show progress.
        options: fields of `SamplingParams` (max_tokens=64, temperature=0, n=2, seed=7, ...) and
            options of `LLM` (dtype="bfloat16", num_blocks=1000, ...). `seed` is the sampling one.

    The model stays loaded for the next call with the same `model` and `LLM` options; other ones
    replace it, and `jpaged.shutdown()` frees it.

    Raises:
        ValueError: a prompt or an option is refused, before anything runs.
        TypeError: an option is unknown or of a wrong type.
    """
    # Imported here so that `import jpaged` loads no model code.
    from jpaged.llm import LLM
    from jpaged.params import SamplingParams
    from jpaged.prompts import as_prompts, check_prompt, is_single

    sampling_names = {field.name for field in dataclasses.fields(SamplingParams)}
    engine_names = set(inspect.signature(LLM).parameters) - {"model", "use_tqdm"}
    unknown = sorted(set(options) - sampling_names - engine_names)
    if unknown:
        raise TypeError(
            f"generate() got unknown options {unknown}; it takes those of SamplingParams "
            f"{sorted(sampling_names)} and of LLM {sorted(engine_names - {'seed'})}"
        )
    params = SamplingParams(**{k: v for k, v in options.items() if k in sampling_names})
    engine_options = {k: v for k, v in options.items() if k not in sampling_names}
    for prompt in as_prompts(prompts):
        check_prompt(prompt)  # as far as one can tell before a model is loaded
    llm = _kept_llm(model, engine_options, use_tqdm=use_tqdm)
    outputs = llm.generate(prompts, params, use_tqdm=use_tqdm)
    return outputs[0] if is_single(prompts) else outputs


def shutdown() -> None:
    """Frees the LLM that `generate` keeps; the next call loads it again."""
    global _kept  # the documented exception to "nothing global"
    if _kept is not None:
        _, llm = _kept
        _kept = None
        llm.close()


def _kept_llm(model: Any, options: dict[str, Any], *, use_tqdm: bool) -> "LLM":
    global _kept
    from jpaged.llm import LLM, check_options

    check_options({"model": model, "use_tqdm": use_tqdm, **options})
    key = (None if model is None else str(model), tuple(sorted(options.items())))
    if _kept is not None and _kept[0] == key:
        return _kept[1]
    shutdown()
    llm = LLM(model, use_tqdm=use_tqdm, **options)
    _kept = (key, llm)
    return llm
