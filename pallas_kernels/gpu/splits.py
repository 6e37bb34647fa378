"""The splits of a context: `split_tokens` each, counted from its first token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


def max_splits(num_tokens: int, split_tokens: int, window: int | None) -> int:
    """How many splits hold a visible token, at most, of a row of so many tokens; at least 1."""
    num_splits = max(1, -(-num_tokens // split_tokens))
    if window is None:
        return num_splits
    return min(num_splits, 1 - (1 - window) // split_tokens)


def live_splits(
    seq_len: Int32[Array, ""], split_tokens: int, window: int | None
) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """A row's first split that holds a visible token, and the one behind its last."""
    start = jnp.int32(0) if window is None else jnp.maximum(seq_len - window, 0)
    return jax.lax.div(start, jnp.int32(split_tokens)), ceil_div(seq_len, split_tokens)


def ceil_div(x: Int32[Array, ""], y: int) -> Int32[Array, ""]:
    """Rounds up, for x from 0 on: `//` would spend instructions on signs."""
    return jax.lax.div(x + (y - 1), jnp.int32(y))
