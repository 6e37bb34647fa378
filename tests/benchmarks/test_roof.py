"""What a step costs at least: the bytes and operations that are counted, by hand."""

from typing import Any

import jax.numpy as jnp
import pytest

from benchmarks.roof import products, roof_of, weights_of
from tests.helpers import tiny_config, tiny_decoder


def test_every_matrix_counts_once_and_nothing_else_does():
    config = tiny_config()
    D, K, G, H = config.hidden_size, config.num_kv_heads, config.group_size, config.head_size
    F, V, L = config.intermediate_size, config.vocab_size, config.num_layers
    weights = weights_of(tiny_decoder(seed=1))
    per_layer = D * K * (G + 2) * H + K * G * H * D + D * 2 * F + F * D
    assert sum(weight.matrix.size for weight in weights) == L * per_layer + V * D
    roof = roof_of(weights, rows=5, kv_bytes=3_000_000, products_ms=7.0, read_gbps=2.0)
    assert roof.weight_bytes == 4 * (L * per_layer + V * D)
    assert roof.flops == 2 * 5 * (L * per_layer + V * D)
    assert roof.ms == pytest.approx(7.0 + 1.5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_of_any_width_run(rows: int, dtype: type):
    weights = weights_of(tiny_decoder(seed=1))
    run = products([w._replace(matrix=w.matrix.astype(dtype)) for w in weights], rows)
    last: Any = run()
    assert last.dtype == dtype
    assert 0 < abs(float(last)) < 1  # the last product's first number, made small
