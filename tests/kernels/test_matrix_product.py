"""Products with weights: C++ in bfloat16 on a CPU, and what stands in for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Backend, matrix_product, product
from pallas_kernels.cpu import build
from pallas_kernels.cpu.build import BuildError
from tests.kernels.cases import BACKENDS
from tests.kernels.test_backends import Gpu, use

# Whole vectors, panels and pairs and not, several rows of the matrix at once and what is left.
SHAPES = [(576, 960), (64, 16), (37, 5), (1, 1), (100, 2500), (17, 1025), (33, 32)]
# Of x: one, and whole turns of the kernel for several, less and more.
NUM_ROWS = [1, 2, 7, 12, 13, 64, 100]


def arrays(
    num_rows: int, num_in: int, num_out: int, *, dtype: str = "bfloat16"
) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(num_in)
    x, matrix = rng.standard_normal((num_rows, num_in)), rng.standard_normal((num_in, num_out))
    return jnp.asarray(x, dtype), jnp.asarray(matrix, dtype)


def expected(x: jax.Array, matrix: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_it_is_numpys(num_rows: int, num_in: int, num_out: int, is_transposed: bool):
    x, matrix = arrays(num_rows, num_in, num_out)
    given = matrix.T if is_transposed else matrix
    sums = matrix_product(x, given, is_transposed=is_transposed)
    assert sums.dtype == jnp.float32
    np.testing.assert_allclose(sums, expected(x, matrix), rtol=0, atol=4e-6 * num_in**0.5)
    stored = matrix_product(x, given, is_transposed=is_transposed, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(stored, sums.astype(jnp.bfloat16))


@pytest.mark.parametrize("num_rows", [1, 5])
def test_the_matrix_may_have_more_axes_behind(num_rows: int):
    x, matrix = arrays(num_rows, 48, 4 * 3 * 16)
    found = matrix_product(x, matrix.reshape(48, 4, 3, 16))
    assert found.shape == (num_rows, 4, 3, 16)
    np.testing.assert_array_equal(found.reshape(num_rows, -1), matrix_product(x, matrix))


@pytest.mark.parametrize("num_rows", [1, 100])
def test_threads_that_share_the_work_change_no_bit(num_rows: int):
    x, matrix = arrays(num_rows, 576, 3072)
    multiply = jax.jit(matrix_product)
    first = np.asarray(multiply(x, matrix))
    for _ in range(20):
        np.testing.assert_array_equal(multiply(x, matrix), first)


def test_a_row_is_the_same_among_others():
    _needs_kernel(2)
    x, matrix = arrays(100, 577, 961)
    together = matrix_product(x, matrix)
    for first, end in ((0, 2), (5, 18), (60, 100)):
        np.testing.assert_array_equal(matrix_product(x[first:end], matrix), together[first:end])


def test_what_lies_around_the_arrays_is_neither_read_nor_written():
    # A NaN there would be in a sum, a write would be seen: the arrays are parts of larger ones.
    x, matrix = arrays(3, 37, 45)
    guard = jnp.full((64,), jnp.nan, jnp.bfloat16)
    for is_transposed in (False, True):
        given = matrix.T if is_transposed else matrix

        @jax.jit
        def between(x, given, is_transposed=is_transposed):
            long = jnp.concatenate([guard, given.reshape(-1), guard])
            middle = long[64:-64].reshape(given.shape)
            return matrix_product(x, middle, is_transposed=is_transposed), long

        found, long = between(x, given)
        np.testing.assert_allclose(found, expected(x, matrix), rtol=0, atol=4e-5)
        assert jnp.isnan(long[:64]).all()
        assert jnp.isnan(long[-64:]).all()


@pytest.mark.parametrize(
    ("num_rows", "why"),
    [
        (1, "float16"),
        (1, "no compiler"),
        (2, "float16"),
        (2, "no compiler"),
        (2, "no instructions"),
    ],
)
def test_what_has_no_kernel_goes_by_xla(num_rows: int, why: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise BuildError("planted")

    if why == "no compiler":
        monkeypatch.setattr(product.cpu, "register", refuse)
    if why == "no instructions":
        monkeypatch.setattr(product.cpu, "processor", lambda: "flags : sse2 avx512_bf16x")
    x, matrix = arrays(num_rows, 100, 70, dtype="float16" if why == "float16" else "bfloat16")
    lowered = jax.jit(lambda *args: matrix_product(*args)).lower(x, matrix)  # traced anew
    assert "jpaged_" not in lowered.as_text()
    np.testing.assert_allclose(matrix_product(x, matrix), expected(x, matrix), rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_on_another_device_nothing_is_compiled(num_rows: int, monkeypatch: pytest.MonkeyPatch):
    def compiled(*_: object) -> None:
        raise AssertionError("nobody asked for it")

    monkeypatch.setattr(product.cpu, "register", compiled)
    use(monkeypatch, Gpu("8.0"))
    assert not product._is_compiled(num_rows)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_another_platform_is_given_its_own_product(num_rows: int):
    _needs_kernel(num_rows)
    x, matrix = arrays(num_rows, 64, 32)
    traced = jax.jit(lambda *args: matrix_product(*args)).trace(x, matrix)
    assert "jpaged_" in traced.lower().as_text()
    assert "jpaged_" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def _needs_kernel(num_rows: int) -> None:
    has_instructions = "avx512_bf16" in build.processor().split()
    if Backend.CPU not in BACKENDS or (num_rows > 1 and not has_instructions):
        pytest.skip("needs a C++ compiler, and for several rows avx512_bf16")
    assert product._is_compiled(num_rows)
