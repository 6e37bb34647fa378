"""The unpaged baseline: static batches over a cache that reserves every row's longest length.

It is what a good implementation without paging does, and as fast as we could make it: the claims
of this repository are measured against it. A batch takes the next prompts in order of arrival
(lengths of answers are not known beforehand, so nothing is sorted), and ends with its last row.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int32

from benchmarks import baseline_model
from benchmarks.baseline_model import Caches, Params
from jpaged.sampling import argmax
from jpaged_models import ModelConfig

# Prompts are padded to the next of these: on average a fifth of a prefill is padding.
PROMPT_LENS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
MIN_RESERVED = 3  # a prompt, a token, and the one sampled last


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What the device knows of a batch's rows; a row of length 0 has ended or was never used."""

    tokens: Int32[Array, " B"]  # the newest of each, not in the cache yet
    lens: Int32[Array, " B"]  # tokens in the cache
    remaining: Int32[Array, " B"]  # tokens it may still generate


def best_cache_dtype(pool_dtype: DTypeLike) -> DTypeLike:
    """The paged pool's, but on a CPU XLA converts all of a bfloat16 cache to write a row."""
    return jnp.float32 if jax.devices()[0].platform == "cpu" else pool_dtype


class Baseline:
    """Generates greedily in batches of `num_rows`, each row with `reserved` tokens of cache.

    The caches and the rows are donated to every program and rebound from it. Programs are compiled
    per padded prompt length, and one for decoding; `warm_up` compiles them all.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        num_rows: int,
        reserved: int,
        cache_dtype: DTypeLike = "float32",
    ) -> None:
        baseline_model.check_family(config)
        if num_rows < 1 or reserved < MIN_RESERVED:
            raise ValueError(
                f"num_rows must be at least 1 and reserved {MIN_RESERVED}, got {num_rows} and "
                f"{reserved}"
            )
        self.config = config
        self.params = params
        self.num_rows = num_rows
        self.reserved = reserved
        self.ladder = [length for length in PROMPT_LENS if length < reserved] + [reserved]
        self._caches = baseline_model.empty_caches(
            config, num_rows=num_rows, reserved=reserved, dtype=cache_dtype
        )

    @property
    def cache_bytes(self) -> int:
        """What the reservation costs."""
        return sum(cache.nbytes for cache in self._caches)

    def generate(
        self, prompts: Sequence[list[int]], max_tokens: Sequence[int], *, ignore_eos: bool
    ) -> list[list[int]]:
        """Each prompt's greedy continuation, ended by `max_tokens` or by an end-of-text token."""
        for prompt, limit in zip(prompts, max_tokens, strict=True):
            self.check_lengths(len(prompt), limit)
        stop_ids = self.stop_ids(ignore_eos)
        outputs = []
        for first in range(0, len(prompts), self.num_rows):
            batch = slice(first, first + self.num_rows)
            outputs += self._run_batch(prompts[batch], max_tokens[batch], stop_ids)
        return outputs

    def logits(self, token_ids: list[int]) -> Float[np.ndarray, "C V"]:
        """The logits after every token, without a cache: for teacher forcing."""
        logits = _forward(self.params, self._pad(token_ids), config=self.config)
        return np.asarray(logits)[: len(token_ids)]

    def warm_up(self, max_prompt_len: int) -> None:
        """Compiles, and runs once, what prompts of up to `max_prompt_len` tokens will need."""
        longest = self._padded_len(max_prompt_len)
        for length in self.ladder:
            if length <= longest:
                self.generate([[0] * min(length, self.reserved - 2)], [2], ignore_eos=True)

    def stop_ids(self, ignore_eos: bool) -> Int32[np.ndarray, " E"]:
        """The ids that end a row; of one shape either way, so that one program serves both."""
        ids = np.array([*self.config.eos_token_ids, -1], np.int32)
        return np.full_like(ids, -1) if ignore_eos else ids

    def check_lengths(self, num_prompt: int, limit: int) -> None:
        """Raises ValueError for what a row could not hold."""
        if num_prompt < 1 or limit < 1 or num_prompt + limit > self.reserved:
            raise ValueError(
                f"a row holds 1 to {self.reserved} tokens, got a prompt of {num_prompt} and "
                f"max_tokens {limit}; raise reserved"
            )

    def empty_rows(self) -> Rows:
        """All rows, none of them in use."""
        return Rows(*(jnp.zeros(self.num_rows, jnp.int32) for _ in range(3)))

    def start_row(
        self,
        rows: Rows,
        row: int,
        prompt: list[int],
        limit: int,
        stop_ids: Int32[np.ndarray, " E"],
    ) -> Rows:
        """The rows with a prompt and its first token in `row`; `rows` is donated."""
        length = np.int32(len(prompt))
        all_kv, logits = _prefill(self.params, self._pad(prompt), length, config=self.config)
        self._caches, rows = _start_row(
            self._caches, rows, all_kv, logits, length, np.int32(row), np.int32(limit), stop_ids
        )
        return rows

    def rows_at(self, context: int) -> Rows:
        """All rows with `context` tokens in the cache and no limit: for timing `step` alone."""
        if context >= self.reserved:
            raise ValueError(f"context must be below the {self.reserved} reserved, got {context}")
        B = self.num_rows
        return Rows(
            tokens=jnp.zeros(B, jnp.int32),
            lens=jnp.full(B, context, jnp.int32),
            remaining=jnp.full(B, self.reserved, jnp.int32),
        )

    def step(self, rows: Rows, stop_ids: Int32[np.ndarray, " E"]) -> Rows:
        """One token more for every row that has not ended; `rows` is donated."""
        self._caches, rows = _decode(self.params, self._caches, rows, stop_ids, config=self.config)
        return rows

    def _run_batch(
        self,
        prompts: Sequence[list[int]],
        max_tokens: Sequence[int],
        stop_ids: Int32[np.ndarray, " E"],
    ) -> list[list[int]]:
        """One static batch, from its prompts to the end of its last row."""
        rows = self.empty_rows()
        for row, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True)):
            # Row by row: padding a batch to its longest prompt would double the work.
            rows = self.start_row(rows, row, prompt, limit, stop_ids)
        outputs = [[] for _ in prompts]
        live = np.arange(self.num_rows) < len(prompts)
        while True:
            # The one place that waits for the device.
            tokens, lens = np.array(rows.tokens), np.array(rows.lens)
            for row in np.flatnonzero(live):
                outputs[row].append(int(tokens[row]))
            live &= lens > 0
            if not live.any():
                return outputs
            rows = self.step(rows, stop_ids)

    def _pad(self, token_ids: list[int]) -> Int32[np.ndarray, " C"]:
        padded = np.zeros(self._padded_len(len(token_ids)), np.int32)
        padded[: len(token_ids)] = token_ids
        return padded

    def _padded_len(self, num_tokens: int) -> int:
        return next(length for length in self.ladder if length >= num_tokens)


@functools.partial(jax.jit, donate_argnames=("caches", "rows"))
def _start_row(
    caches: Caches,
    rows: Rows,
    all_kv: list[Float[Array, "T K W"]],
    logits: Float[Array, " V"],
    length: Int32[Array, ""],
    row: Int32[Array, ""],
    limit: Int32[Array, ""],
    stop_ids: Int32[Array, " E"],
) -> tuple[Caches, Rows]:
    """Enters a prefilled prompt and its first token. Compiles once per padded length."""
    token = argmax(logits[None])[0]
    ended = (limit <= 1) | jnp.any(token == stop_ids)
    rows = Rows(
        tokens=rows.tokens.at[row].set(token),
        lens=rows.lens.at[row].set(jnp.where(ended, 0, length)),
        remaining=rows.remaining.at[row].set(limit - 1),
    )
    return baseline_model.store_prompt(caches, all_kv, row), rows


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("caches", "rows"))
def _decode(
    params: Params,
    caches: Caches,
    rows: Rows,
    stop_ids: Int32[Array, " E"],
    *,
    config: ModelConfig,
) -> tuple[Caches, Rows]:
    """One token more for every row that has not ended. Compiles once per shape of the caches."""
    caches, logits_BV = baseline_model.decode(params, caches, rows.tokens, rows.lens, config=config)
    tokens_B = argmax(logits_BV)  # as on the paged side: XLA's own is slow on a CPU
    stopped_B = jnp.any(tokens_B[:, None] == stop_ids[None, :], axis=1)
    ended_B = (rows.lens == 0) | (rows.remaining <= 1) | stopped_B
    rows = Rows(
        tokens=tokens_B,
        lens=jnp.where(ended_B, 0, rows.lens + 1),
        remaining=rows.remaining - 1,
    )
    return caches, rows


# Both compile once per padded prompt length, whatever the shape of the caches.
_prefill = jax.jit(baseline_model.prefill, static_argnames=("config",))
_forward = jax.jit(baseline_model.forward, static_argnames=("config",))
