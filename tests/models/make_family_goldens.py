"""Writes goldens/families.npz: each family's greedy tokens and logits under Transformers.

Needs torch and transformers; from the repository's root:

    PYTHONPATH=.:models python -m tests.models.make_family_goldens
"""

import json
import pathlib

import numpy as np

from tests.helpers import NEAR_TIE
from tests.models.families import FAMILIES, VOCAB_SIZE
from tests.parity import transformers_side

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
            prompt = np.random.default_rng(index).integers(0, VOCAB_SIZE, num_prompt)
            found = transformers_side.greedy(model, prompt.tolist(), num_tokens)
            assert min(found.margins) > NEAR_TIE, f"{family}: choose other weights or prompts"
            assert len(set(found.tokens)) > 2, f"{family}: repeats itself, which proves little"
            key = f"{family}/{index}"
            arrays[f"{key}/prompt"] = prompt.astype(np.int32)
            arrays[f"{key}/tokens"] = np.asarray(found.tokens, np.int32)
            arrays[f"{key}/logits"] = found.logits.astype(np.float32)
    arrays["about"] = np.asarray(json.dumps(about))
    np.savez_compressed(GOLDEN, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{GOLDEN}: {GOLDEN.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
