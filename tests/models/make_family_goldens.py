"""Writes goldens/families.npz: each family's greedy tokens and logits under Transformers.

Needs torch and transformers; from the repository's root:

    PYTHONPATH=.:models python -m tests.models.make_family_goldens
"""

import itertools
import json
import pathlib
from typing import Any

import numpy as np

from tests.helpers import NEAR_TIE
from tests.models.families import FAMILIES, VOCAB_SIZE
from tests.parity import transformers_side
from tests.parity.transformers_side import Greedy

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "families.npz"
# The last one starts a step after the others and ends with them.
LENGTHS = [(5, 8), (11, 8), (23, 6)]  # of prompts, and of what follows


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    about = {"made_with": dict(transformers_side.versions()), "shapes": {}}
    for family in FAMILIES:
        model = transformers_side.family_model(family)
        about["shapes"][family] = transformers_side.tensor_shapes(model)
        for index, (num_prompt, num_tokens) in enumerate(LENGTHS):
            prompt, found = telling_prompt(model, num_prompt, num_tokens)
            key = f"{family}/{index}"
            arrays[f"{key}/prompt"] = np.asarray(prompt, np.int32)
            arrays[f"{key}/tokens"] = np.asarray(found.tokens, np.int32)
            arrays[f"{key}/logits"] = found.logits.astype(np.float32)
    arrays["about"] = np.asarray(json.dumps(about))
    np.savez_compressed(GOLDEN, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{GOLDEN}: {GOLDEN.stat().st_size // 1024} KiB")


def telling_prompt(model: Any, num_prompt: int, num_tokens: int) -> tuple[list[int], Greedy]:
    """The first random prompt whose continuation has no near tie and does not repeat itself."""
    for seed in itertools.count(num_prompt):
        prompt = np.random.default_rng(seed).integers(0, VOCAB_SIZE, num_prompt).tolist()
        found = transformers_side.greedy(model, prompt, num_tokens)
        if min(found.margins) > 20 * NEAR_TIE and len(set(found.tokens)) > num_tokens // 2:
            return prompt, found
    raise AssertionError("there is always another seed")


if __name__ == "__main__":
    main()
