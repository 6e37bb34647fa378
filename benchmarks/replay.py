"""Prefix hits of a Mooncake trace, replayed block by block, beside an ideal LRU of the same size.

A Mooncake line names its prompt's content by `hash_ids`, one for every 512 tokens (Qin et al.,
arXiv 2407.00079; github.com/kvcache-ai/Mooncake, Apache-2.0). Requests run one after another in
the trace's order and answer one token, so that hits depend on the cache alone.
"""

import collections
import dataclasses
import os

from benchmarks.lengths import read_mooncake
from benchmarks.scripted import make_request
from jpaged.config import EngineConfig
from jpaged.scheduler import Scheduler

CONTENT_SIZE = 512  # tokens that one of the trace's hash ids stands for
NAMES = ("input_length", "output_length", "hash_ids", "timestamp")  # in a line of the trace


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """What a line of the trace asks."""

    num_tokens: int
    hash_ids: tuple[int, ...]
    num_outputs: int
    arrival_s: float

    def token_ids(self) -> list[int]:
        """Tokens that are equal where the hash ids are, and nowhere else."""
        token_ids = [
            token
            for hash_id in self.hash_ids
            for token in range(hash_id * CONTENT_SIZE, (hash_id + 1) * CONTENT_SIZE)
        ]
        return token_ids[: self.num_tokens]

    def blocks(self, block_size: int) -> list[tuple[int, int]]:
        """A name for each whole block; a hash id stands for its whole prefix, so this does too."""
        parts = CONTENT_SIZE // block_size
        return [
            (self.hash_ids[index // parts], index % parts)
            for index in range(self.num_tokens // block_size)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hits:
    """The share of prompts' whole blocks that were cached; `pieces` are of 512 tokens."""

    num_blocks: int | None  # None: never evicts
    measured: float
    ideal: float
    pieces: float
    ideal_pieces: float


def read_prompts(path: str | os.PathLike, num_requests: int) -> list[Prompt]:
    """The prompts of a Mooncake trace's first lines; one without tokens is passed over."""
    lines = read_mooncake(path, NAMES, num_requests)
    prompts = [
        Prompt(
            line["input_length"],
            tuple(line["hash_ids"]),
            max(line["output_length"], 1),
            line["timestamp"] / 1000,
        )
        for line in lines
        if line["input_length"] > 0
    ]
    if not prompts:
        raise ValueError(f"{path} needs a prompt with tokens; got none in {len(lines)} lines")
    return prompts


def replay(prompts: list[Prompt], *, num_blocks: int | None, block_size: int) -> Hits:
    """Runs the prompts through the scheduler with `num_blocks` usable blocks."""
    unbounded = 2 + sum(-(-prompt.num_tokens // block_size) + 1 for prompt in prompts)
    longest = max(prompt.num_tokens for prompt in prompts)
    scheduler = Scheduler(
        EngineConfig(
            block_size=block_size,
            num_blocks=unbounded if num_blocks is None else num_blocks + 1,
            max_num_seqs=1,
            max_num_batched_tokens=longest,
            max_model_len=longest + 2,
        )
    )
    hit_blocks = hit_pieces = 0
    for index, prompt in enumerate(prompts):
        scheduler.add(make_request(index, prompt.token_ids(), 1))
        plan = scheduler.schedule()
        assert plan is not None, "the pool holds every prompt"
        (row,) = plan.rows
        hit_blocks += row.start // block_size
        # The last piece may be short: all of it is known when all but the last token is.
        known = row.start == prompt.num_tokens - 1
        hit_pieces += len(prompt.hash_ids) if known else row.start // CONTENT_SIZE
        scheduler.commit(plan, [-1])
    num_whole = sum(prompt.num_tokens // block_size for prompt in prompts)
    num_pieces = sum(len(prompt.hash_ids) for prompt in prompts)
    return Hits(
        num_blocks=num_blocks,
        measured=hit_blocks / num_whole,
        ideal=_lru([prompt.blocks(block_size) for prompt in prompts], num_blocks) / num_whole,
        pieces=hit_pieces / num_pieces,
        ideal_pieces=_lru(
            [prompt.hash_ids for prompt in prompts],
            None if num_blocks is None else num_blocks * block_size // CONTENT_SIZE,
        )
        / num_pieces,
    )


def _lru(chains: list, capacity: int | None) -> int:
    """Hits of a cache that drops what was used longest ago, a chain's tail before its head."""
    cache: collections.OrderedDict = collections.OrderedDict()
    hits = 0
    for chain in chains:
        length = 0
        while length < len(chain) and chain[length] in cache:
            length += 1
        hits += length
        for name in reversed(chain):
            cache[name] = None
            cache.move_to_end(name)
        while capacity is not None and len(cache) > capacity:
            cache.popitem(last=False)
    return hits
