"""Sets of requests that engines are compared on: one user, many, and many that share prefixes.

A set is a list of waves. The requests of a wave come at once, as soon as the wave before has ended.
"""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from benchmarks.peers.worker import WARM_UP, Request

NAMES = ("single", "workload", "prefix", "prefix-led")
NUM_REQUESTS = 64
SINGLE = (128, 128)  # tokens of the prompt and of the answer
NUM_GROUPS, NUM_SHARED, NUM_OWN, NUM_ANSWER = 8, 256, 32, 64  # of the shared prefixes
SIGMA = 0.8  # of both lognormal laws
INPUTS, OUTPUTS = (160, 8, 512), (100, 4, 256)  # mean before clipping, least, most


def read_requests(path: str | os.PathLike) -> list[Request]:
    """JSON lines with `prompt_token_ids` and `output_len`. Raises ValueError."""
    found: list[Request] = []
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            prompt, count = list(map(int, entry["prompt_token_ids"])), int(entry["output_len"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with prompt_token_ids and "
                f"output_len, got {line[:60]!r}"
            ) from error
        found.append((prompt, count))
    if not found:
        raise ValueError(f"{path} has no requests")
    return found


def drawn_requests(*, vocab_size: int, seed: int) -> list[Request]:
    """64 requests of lognormal lengths, random tokens."""
    rng = np.random.default_rng(seed)
    inputs, outputs = _lengths(rng, *INPUTS), _lengths(rng, *OUTPUTS)
    prompts = [rng.integers(0, vocab_size, size).tolist() for size in inputs]
    return list(zip(prompts, outputs, strict=True))


def drawn_prefixes(*, vocab_size: int, seed: int) -> list[Request]:
    """Groups of 8 requests with a prefix of 256 tokens each, in a random order of arrival."""
    rng = np.random.default_rng(seed)
    found: list[Request] = []
    for _ in range(NUM_GROUPS):
        shared = rng.integers(0, vocab_size, NUM_SHARED).tolist()
        own = rng.integers(0, vocab_size, (NUM_REQUESTS // NUM_GROUPS, NUM_OWN)).tolist()
        found += [(shared + tail, NUM_ANSWER) for tail in own]
    return [found[index] for index in rng.permutation(len(found))]


def make_sets(
    requests: Sequence[Request], prefixes: Sequence[Request]
) -> dict[str, list[list[Request]]]:
    """All sets. A led one has the first request of each prefix come, and end, before the others.

    Raises:
        ValueError: no prompt is long enough for one user's, or no two share a prefix.
    """
    prompt = next((p for p, _ in requests if len(p) >= SINGLE[0]), None)
    if prompt is None:
        raise ValueError(f"one request at least must have a prompt of {SINGLE[0]} tokens")
    first, rest = led_by_first(prefixes)
    if not rest:
        raise ValueError(f"two requests at least must share their first {NUM_SHARED} tokens")
    return {
        "single": [[(prompt[: SINGLE[0]], SINGLE[1])]],
        "workload": [list(requests)],
        "prefix": [list(prefixes)],
        "prefix-led": [first, rest],
    }


def led_by_first(requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """The first request of each prefix, and the others."""
    seen: set[tuple[int, ...]] = set()
    first: list[Request] = []
    rest: list[Request] = []
    for request in requests:
        prefix = tuple(request[0][:NUM_SHARED])
        (rest if prefix in seen else first).append(request)
        seen.add(prefix)
    return first, rest


def longest(sets: dict[str, list[list[Request]]]) -> int:
    """Tokens of the longest prompt and answer together, those of a warm-up among them."""
    requests = [request for waves in sets.values() for wave in waves for request in wave]
    return max(len(prompt) + count for prompt, count in requests + WARM_UP)


def _lengths(rng: np.random.Generator, mean: int, least: int, most: int) -> list[int]:
    drawn = rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, NUM_REQUESTS)
    return np.clip(np.round(drawn), least, most).astype(int).tolist()
