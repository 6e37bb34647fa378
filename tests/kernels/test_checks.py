"""Shapes and dtypes that no kernel looks at again: one that is wrong is refused by name.

Called as users do, without the annotations being checked.
"""

import inspect
from typing import Any

import jax.numpy as jnp
import pytest

from pallas_kernels import Backend, PagedBatch, dispatch

B, M, N, K, S, H, T = 3, 4, 6, 2, 8, 16, 5


def arguments() -> dict[str, Any]:
    """Of `paged_decode`; all of them fit each other."""
    return {
        "q": jnp.zeros((B, N, H)),
        "pool": jnp.zeros((7, K, S, 2 * H)),
        "block_tables": jnp.zeros((B, M), jnp.int32),
        "seq_lens": jnp.zeros(B, jnp.int32),
    }


def decode(**changes: Any) -> Any:
    call = inspect.unwrap(dispatch.paged_decode)
    return call(**arguments() | {"scale": 0.3, "backend": Backend.XLA} | changes)


def attend(**changes: Any) -> Any:
    fields = {
        "block_tables": jnp.zeros((B, M), jnp.int32),
        "query_starts": jnp.array([0, 1, 3, 5], jnp.int32),
        "seq_lens": jnp.ones(B, jnp.int32),
        "num_decodes": jnp.int32(1),
    }
    batch = PagedBatch(**fields | changes)
    call = inspect.unwrap(dispatch.paged_attention)
    pool = arguments()["pool"]
    return call(jnp.zeros((T, N, H)), pool, batch, scale=0.3, backend=Backend.XLA)


def write(**changes: Any) -> Any:
    kv = jnp.zeros((T, K, H))
    fields = {"k": kv, "v": kv, "slots": jnp.zeros(T, jnp.int32), "backend": Backend.XLA}
    call = inspect.unwrap(dispatch.write_kv)
    return call(arguments()["pool"], **fields | changes)


def test_what_fits_is_taken():
    assert decode(sinks=jnp.zeros(N)).shape == (B, N, H)
    assert attend().shape == (T, N, H)
    assert write().shape == (7, K, S, 2 * H)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((B, N, H), jnp.int32)}, "q must be .* floating point, got .* of int32"),
        ({"q": jnp.zeros((N, H))}, r"q must be \[T, N, H\] of floating point, got \[6, 16\]"),
        ({"pool": jnp.zeros((7, K, 2 * H))}, r"the pool must be \[P, K, S, 2H\]"),
        ({"block_tables": jnp.zeros((B + 1, M), jnp.int32)}, r"must be \[3, M\] of int32, got \[4"),
        ({"block_tables": jnp.zeros((B - 1, M), jnp.int32)}, r"must be \[3, M\] of int32, got \[2"),
        ({"block_tables": jnp.zeros((B, M))}, "block_tables .* of int32, got .* of float32"),
        ({"block_tables": jnp.zeros((B, M), jnp.int16)}, "of int32, got .* of int16"),
        ({"block_tables": jnp.zeros((B, 0), jnp.int32)}, "at least one row and one column"),
        ({"seq_lens": jnp.zeros(B + 2, jnp.int32)}, r"seq_lens must be \[3\] of int32, got \[5\]"),
        (
            {"seq_lens": jnp.zeros(B, jnp.int8)},
            r"seq_lens must be \[3\] of int32, got \[3\] of int8",
        ),
        ({"sinks": jnp.zeros(K)}, r"sinks must be \[6\] of floating point, got \[2\]"),
        (
            {"pool": jnp.zeros((7, K, S, 2 * H), jnp.int8), "kv_scales": jnp.ones((K + 1, 2))},
            r"kv_scales must be \[2, 2\] of floating point, got \[3, 2\]",
        ),
    ],
    ids=str,
)
def test_a_wrong_argument_of_decode_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        decode(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query_starts": jnp.zeros(B, jnp.int32)},
            "needs 4 query_starts and 3 seq_lens, got 3 and 3",
        ),
        ({"num_decodes": jnp.zeros(1, jnp.int32)}, r"num_decodes must be \[\] of int32, got \[1\]"),
        ({"seq_lens": jnp.ones(B)}, "seq_lens .* of int32, got .* of float32"),
    ],
    ids=str,
)
def test_a_wrong_batch_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        attend(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"k": jnp.zeros((T, K, 2 * H))},
            r"k must be \[5, 2, 16\] of floating point, got \[5, 2, 32\]",
        ),
        (
            {"v": jnp.zeros((T, K - 1, H))},
            r"v must be \[5, 2, 16\] of floating point, got \[5, 1, 16\]",
        ),
        ({"slots": jnp.zeros(T - 1, jnp.int32)}, r"k must be \[4, 2, 16\]"),
        ({"slots": jnp.zeros(T)}, r"slots must be \[T\] of int32, got \[5\] of float32"),
    ],
    ids=str,
)
def test_a_wrong_write_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        write(**changes)
