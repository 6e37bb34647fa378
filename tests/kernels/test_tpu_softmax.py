"""What the products of the TPU kernels are told, which no result on a CPU shows."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.tpu import decode, ragged
from tests.kernels.cases import SCALE, make_case

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.parametrize(
    ("dtype", "pool_dtype", "precision"),
    [
        ("float32", "float32", HIGHEST),
        ("float32", "int8", HIGHEST),
        ("bfloat16", "bfloat16", None),
        ("bfloat16", "int8", None),
    ],
)
def test_float32_is_not_rounded_to_bfloat16_and_every_sum_is_float32(
    dtype: str, pool_dtype: str, precision: Any
):
    case = make_case([(1, 9), (5, 21)])
    q, pool = jnp.zeros(case.q.shape, dtype), jnp.zeros(case.pool.shape, pool_dtype)
    batch, B = case.batch, len(case.batch.seq_lens)
    options: dict[str, Any] = {"scale": SCALE, "interpret": True}
    if pool_dtype == "int8":
        options["kv_scales"] = jnp.ones((2, pool.shape[1]))

    def both(q, pool, batch):
        decoded = decode.paged_decode(q[:B], pool, batch.block_tables, batch.seq_lens, **options)
        return decoded, ragged.paged_prefill(q, pool, batch, decoded, **options)

    calls = [
        each
        for each in equations(jax.make_jaxpr(both)(q, pool, batch).jaxpr)
        if each.primitive.name == "pallas_call"
    ]
    assert len(calls) == 2
    for call in calls:
        products = [
            each.params
            for each in equations(call.params["jaxpr"])
            if each.primitive.name == "dot_general"
        ]
        assert len(products) >= 2
        assert {product["precision"] for product in products} == {precision}
        assert {product["preferred_element_type"] for product in products} == {jnp.dtype("float32")}


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a jaxpr and of the jaxprs within."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
