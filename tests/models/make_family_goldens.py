"""Writes the goldens of `families.py` with Transformers and PyTorch.

PYTHONPATH=.:models python -m tests.models.make_family_goldens
"""

import json
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from tests.models.families import FAMILIES, GOLDENS, Golden, make_prompts, make_tensor


def main() -> None:
    """Writes one file a family."""
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for name in FAMILIES:
        golden = transformers_golden(name)
        about = {"config": golden.config, "shapes": golden.shapes, "prompts": golden.prompts}
        logits = {f"logits{i}": each for i, each in enumerate(golden.logits)}
        stored: dict[str, Any] = {"about": json.dumps(about), **logits}
        np.savez_compressed(GOLDENS / f"{name}.npz", **stored)
        print(f"{name}: {sum(np.prod(shape) for shape in golden.shapes.values())} parameters")


def transformers_golden(name: str) -> Golden:
    """The family's tiny model run by Transformers, in float32 on the CPU."""
    model_type, options = FAMILIES[name]
    config = transformers.AutoConfig.for_model(model_type, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    config.architectures = [type(model).__name__]
    model = model.float().eval()
    tied = set(model.all_tied_weights_keys)
    shapes = {
        key: list(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied
    }
    weights = {key: torch.tensor(make_tensor(key, shape)) for key, shape in shapes.items()}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    prompts = make_prompts(name, config.vocab_size)
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]
    return Golden(config.to_dict(), shapes, prompts, logits)


if __name__ == "__main__":
    main()
