"""Writes goldens/smollm2.npz: what Transformers makes of the default model, read by itself.

Needs torch, transformers and the default model's data package; from the repository's root:

    PYTHONPATH=.:models python -m tests.engine.make_smollm2_goldens
"""

import json
import pathlib

import numpy as np

from jpaged_models import open_checkpoint
from jpaged_models.weights import hub
from tests.engine.prose import FEW_LENGTHS, TEXT, prompts_of
from tests.parity import transformers_side

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "smollm2.npz"
NUM_TOKENS = 20
NUM_SHOWN = 12  # logits kept of each position, at ids drawn once


def main() -> None:
    packaged = hub.packaged_default()
    assert packaged is not None, "install the default model's data package"
    model = transformers_side.packaged_model(packaged.directory)
    tokenizer = open_checkpoint(None).tokenizer
    assert tokenizer is not None
    shown = np.sort(np.random.default_rng(0).choice(tokenizer.vocab_size, NUM_SHOWN, replace=False))
    arrays: dict[str, np.ndarray] = {
        "made_with": np.asarray(json.dumps(dict(transformers_side.versions()))),
        "shown_ids": shown.astype(np.int32),
    }
    for index, prompt in enumerate(prompts_of(tokenizer.encode(TEXT), FEW_LENGTHS)):
        found = transformers_side.greedy(model, prompt, NUM_TOKENS)
        arrays[f"{index}/prompt"] = np.asarray(prompt, np.int32)
        arrays[f"{index}/tokens"] = np.asarray(found.tokens, np.int32)
        arrays[f"{index}/margins"] = np.asarray(found.margins, np.float32)
        arrays[f"{index}/logits"] = found.logits[:, shown].astype(np.float32)
        arrays[f"{index}/largest"] = np.max(np.abs(found.logits), axis=-1).astype(np.float32)
        print(index, len(prompt), f"{min(found.margins):.4f}", repr(tokenizer.decode(found.tokens)))
    np.savez_compressed(GOLDEN, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{GOLDEN}: {GOLDEN.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
