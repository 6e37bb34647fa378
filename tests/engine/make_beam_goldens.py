"""Writes goldens/beams.json: what Transformers' beam search makes of the default model.

Needs torch, transformers and the default model's data package; from the repository's root:

    PYTHONPATH=.:models python -m tests.engine.make_beam_goldens
"""

import json
import pathlib
from typing import Any

from jpaged_models import open_checkpoint
from jpaged_models.weights import hub
from tests.engine.prose import TEXT, prompts_of
from tests.parity import transformers_side

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "beams.json"
LENGTHS = (3, 16, 45, 130)
SETTINGS: list[dict[str, Any]] = [
    {"beam_width": 2, "max_tokens": 16, "length_penalty": 1.0, "early_stopping": False},
    {"beam_width": 4, "max_tokens": 20, "length_penalty": 0.0, "early_stopping": "never"},
    {"beam_width": 4, "max_tokens": 24, "length_penalty": 1.0, "early_stopping": True},
]
END_IDS = (30, 198)  # "." and the end of a line, so that beams end before their last token


def main() -> None:
    packaged = hub.packaged_default()
    assert packaged is not None, "install the default model's data package"
    model = transformers_side.packaged_model(packaged.directory)
    checkpoint = open_checkpoint(None)
    assert checkpoint.tokenizer is not None
    prompts = prompts_of(checkpoint.tokenizer.encode(TEXT), LENGTHS)
    searches = []
    for number, settings in enumerate(SETTINGS):
        for prompt in prompts:
            stop_token_ids = list(END_IDS) if number == 2 else []
            end_ids = [*checkpoint.config.eos_token_ids, *stop_token_ids]
            found = transformers_side.beam_search(model, prompt, end_ids=end_ids, **settings)
            params = settings | {"stop_token_ids": stop_token_ids}
            searches.append(
                {"params": params, "prompt": prompt, "tokens": found.tokens, "scores": found.scores}
            )
            gaps = [a - b for a, b in zip(found.scores, found.scores[1:], strict=False)]
            print(number, len(prompt), f"{min(gaps):.4f}", [len(tokens) for tokens in found.tokens])
    golden = {"made_with": dict(transformers_side.versions()), "searches": searches}
    GOLDEN.write_text(json.dumps(golden) + "\n")
    print(f"{GOLDEN}: {GOLDEN.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
