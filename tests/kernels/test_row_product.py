"""The product of one row: C++ on a CPU, and what stands in for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Backend, product, row_product
from pallas_kernels.cpu.build import BuildError
from tests.kernels.cases import BACKENDS
from tests.kernels.test_backends import Gpu, use

# Whole vectors and not, several rows of the matrix at once and what is left of them.
SHAPES = [(576, 960), (64, 16), (37, 5), (1, 1), (100, 2500), (17, 1025)]


def arrays(num_in: int, num_out: int, *, dtype: str = "bfloat16") -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(num_in)
    x, matrix = rng.standard_normal((1, num_in)), rng.standard_normal((num_in, num_out))
    return jnp.asarray(x, dtype), jnp.asarray(matrix, dtype)


def expected(x: jax.Array, matrix: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_it_is_numpys(num_in: int, num_out: int, is_transposed: bool):
    x, matrix = arrays(num_in, num_out)
    given = matrix.T if is_transposed else matrix
    found = jax.jit(row_product, static_argnames="is_transposed")(
        x, given, is_transposed=is_transposed
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected(x, matrix), rtol=0, atol=4e-6 * num_in**0.5)


def test_the_matrix_may_have_more_axes_behind():
    x, matrix = arrays(48, 4 * 3 * 16)
    found = row_product(x, matrix.reshape(48, 4, 3, 16))
    np.testing.assert_array_equal(found.reshape(1, -1), row_product(x, matrix))


def test_threads_that_share_the_work_change_no_bit():
    x, matrix = arrays(576, 3072)
    multiply = jax.jit(row_product)
    first = np.asarray(multiply(x, matrix))
    for _ in range(20):
        np.testing.assert_array_equal(multiply(x, matrix), first)


@pytest.mark.parametrize("why", ["float16", "no compiler"])
def test_what_has_no_kernel_goes_by_xla(why: str, monkeypatch: pytest.MonkeyPatch):
    def refuse() -> None:
        raise BuildError("planted")

    if why == "no compiler":
        monkeypatch.setattr(product.cpu, "register", refuse)
    x, matrix = arrays(100, 70, dtype="float16" if why == "float16" else "bfloat16")
    hlo = jax.jit(row_product).lower(x, matrix).as_text()
    assert "jpaged_row_product" not in hlo
    np.testing.assert_allclose(row_product(x, matrix), expected(x, matrix), rtol=0, atol=1e-4)


def test_on_another_device_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch):
    def compiled() -> None:
        raise AssertionError("nobody asked for it")

    monkeypatch.setattr(product.cpu, "register", compiled)
    use(monkeypatch, Gpu("8.0"))
    assert not product._is_compiled()
    monkeypatch.undo()
    assert product._is_compiled() == (Backend.CPU in BACKENDS)


def test_another_platform_is_given_its_own_product():
    x, matrix = arrays(64, 32)
    lowered = jax.jit(row_product).trace(x, matrix).lower(lowering_platforms=("tpu",))
    assert "jpaged_row_product" not in lowered.as_text()
