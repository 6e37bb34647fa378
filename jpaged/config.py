"""The serving limits of one engine."""

import dataclasses

from jpaged.params import checked_flag, checked_int

MIN_BLOCK_SIZE = (
    8  # a TPU tile holds eight rows of 32 bits: smaller blocks could not be copied whole
)
MAX_BLOCK_SIZE = (
    128  # beyond it the half empty last block is more than a few per cent of a sequence
)

DEFAULT_MAX_WAITING = 65_536  # sequences; a queue without end hides an overload


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine may hold and may do in one step; checked when made.

    `num_blocks` counts the null block, which is never given out. A pool smaller than
    `max_model_len` is legal: a request that could never fit it is refused when it is added.
    """

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_waiting: int = DEFAULT_MAX_WAITING
    enable_prefix_caching: bool = True
    num_swap_blocks: int = 0  # of host memory, for sequences that are preempted
    async_scheduling: bool = True  # a step is planned while the one before it runs

    def __post_init__(self) -> None:
        checked_flag("enable_prefix_caching", self.enable_prefix_caching)
        checked_flag("async_scheduling", self.async_scheduling)
        for name, least in _LEAST.items():
            object.__setattr__(self, name, checked_int(name, getattr(self, name), least=least))
        size = self.block_size
        if size & (size - 1) or not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE:
            raise ValueError(
                f"block_size must be a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}, "
                f"got {size}"
            )

    @property
    def max_blocks_per_seq(self) -> int:
        """Blocks of a sequence that has reached `max_model_len`."""
        return self.blocks_for(self.max_model_len)

    @property
    def max_running(self) -> int:
        """Sequences that can run at once: each has a row, and a token of every step."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    def check_lengths(self, num_prompt: int, max_tokens: int | None, *, num_beams: int = 1) -> None:
        """Raises ValueError for a request that could never run to its end.

        Its `num_beams` sequences wait for one another, so there must be room for all at once. They
        share the whole blocks of their prompt, but for the last token's, which each may compute.
        """
        if num_prompt == 0:
            raise ValueError("the prompt must have at least one token, got none")
        if num_prompt >= self.max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and max_model_len is {self.max_model_len}, "
                "which must leave room for one more; shorten the prompt or raise max_model_len"
            )
        longest = self.max_model_len
        if max_tokens is not None:
            longest = min(num_prompt + max_tokens, longest)
        if num_beams > self.max_running:
            raise ValueError(
                f"beam_width={num_beams} needs as many sequences at once, and max_num_seqs and "
                f"max_num_batched_tokens allow {self.max_running}; lower beam_width or raise them"
            )
        num_shared = (num_prompt - 1) // self.block_size if self.enable_prefix_caching else 0
        num_own = self.blocks_for(longest - 1) - num_shared  # nobody reads the last token's K/V
        num_needed, num_there = num_shared + num_beams * num_own, self.num_blocks - 1
        if num_needed > num_there:
            beams = f", {num_beams} beams" if num_beams > 1 else ""
            raise ValueError(
                f"{num_prompt} prompt tokens and max_tokens={max_tokens}{beams} may need "
                f"{num_needed} blocks of {self.block_size} tokens and the pool has {num_there}, "
                "so the request can never fit; lower max_tokens, shorten the prompt or raise "
                "num_blocks"
            )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)


_LEAST = {  # of what counts something
    "block_size": 1,
    "num_blocks": 2,  # the null block, and one to give out
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_model_len": 2,  # a token of prompt and one of answer
    "max_waiting": 1,
    "num_swap_blocks": 0,
}
