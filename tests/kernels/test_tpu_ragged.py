"""The TPU prefill kernel in TPU interpret mode, against NumPy in float64.

The simulator fills memory with NaN, and so does every test the slots that no row may see.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import ragged
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.cases import SCALE, Case, dense, make_case
from tests.kernels.simulator import Outcome, simulate

TILE = ragged.RaggedTile(tokens=16, blocks=2)


def run(
    case: Case,
    dtype: str = "float32",
    *,
    tile: ragged.RaggedTile | None = TILE,
    options: dict[str, Any] | None = None,
    **params: Any,
) -> Outcome:
    """The kernel's answers; those of decode rows are a number that no attention gives."""
    B, (_, N, H) = case.batch.seq_lens.shape[0], case.q.shape
    decoded = jnp.full((B, N, H), 77.0, dtype)
    q, pool = jnp.asarray(case.q, dtype), jnp.asarray(case.pool, dtype)

    def kernel(mode: pltpu.InterpretParams) -> jax.Array:
        return ragged.paged_prefill(
            q, pool, case.batch, decoded, scale=SCALE, tile=tile, interpret=mode, **options or {}
        )

    outcome = simulate(kernel, **params)
    return outcome._replace(out=outcome.out.astype(np.float64))


def check(case: Case, outcome: Outcome, dtype: str = "float32", **options: Any) -> None:
    num_decodes, end = int(case.batch.num_decodes), int(case.batch.query_starts[-1])
    assert (outcome.out[:num_decodes] == 77).all()
    assert not outcome.out[end:].any()
    expected = dense(case, **options)[num_decodes:end]
    assert_close(outcome.out[num_decodes:end], expected, TOLERANCES[dtype].attention)
    assert not outcome.raced


def test_prompts_and_chunks_among_decodes_agree_with_numpy():
    case = make_case([(1, 9), (7, 7), (19, 41), (1, 1), (16, 16), (2, 33)])
    check(case, run(case))
