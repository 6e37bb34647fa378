"""The TPU kernel that writes K and V, in TPU interpret mode and through the real compiler.

The pool before is random bits, NaN of every kind among them, and the simulator fills other memory
with NaN of one kind: a slot that is not written keeps its bits.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from benchmarks.tpu.topology import TOPOLOGIES, compile_for_tpu, missing_libtpu
from pallas_kernels import Backend, pool_shape, write_kv
from pallas_kernels.tpu import write
from pallas_kernels.tpu.device import whole_lanes
from tests.kernels import simulator
from tests.kernels.simulator import Outcome

needs_libtpu = pytest.mark.skipif(missing_libtpu() is not None, reason=missing_libtpu() or "")
P, K, S, H = 7, 3, 16, 10


class Case(NamedTuple):
    """A kernel's arguments, and the pool that NumPy makes of them."""

    pool: jax.Array
    kv: jax.Array
    slots: jax.Array
    expected: np.ndarray


def make_case(
    slots: Sequence[int],
    *,
    num_tokens: int = 48,  # one shape, compiled once
    shape: tuple[int, int, int, int] = (P, K, S, H),
    dtype: str = "float32",
) -> Case:
    """The slots, and then those of padding tokens."""
    rng = np.random.default_rng(0)
    P, K, S, H = shape
    slots = [*slots, *[0] * (num_tokens - len(slots))]
    before = rng.integers(0, 256, (P, K, S, 2 * H * jnp.dtype(dtype).itemsize), np.uint8)
    expected = before.view(jnp.dtype(dtype))
    pool = jnp.array(expected)
    kv = jnp.asarray(rng.standard_normal((len(slots), K, 2 * H)) * 40, dtype)
    for token, slot in enumerate(slots):
        block, offset = divmod(slot, S)
        if 1 <= block < P:
            expected[block, :, offset] = np.asarray(kv[token])
    return Case(pool, kv, jnp.asarray(slots, jnp.int32), expected)


compiled_once = jax.jit(write.write_kv, static_argnames="interpret")


def simulate(
    case: Case, write_kv: Callable[..., jax.Array] = compiled_once, **params: Any
) -> Outcome:
    """What the kernel makes of the pool; what changes the module must pass `write.write_kv`."""
    kernel = functools.partial(write_kv, case.pool, case.kv, case.slots)
    return simulator.simulate(lambda mode: kernel(interpret=mode), **params)


def differ(case: Case, outcome: Outcome) -> np.ndarray:
    """Which slots of the pool are not what NumPy makes of them, NaN bits included."""
    bits = f"u{case.expected.dtype.itemsize}"
    return (outcome.out.view(bits) != case.expected.view(bits)).any(axis=(1, 3))


def check(case: Case, outcome: Outcome) -> None:
    assert not differ(case, outcome).any()
    assert not outcome.raced


def run(block: int, start: int, end: int) -> list[int]:
    return list(range(block * S + start, block * S + end))


def test_one_token_a_row_and_padding_agree_with_numpy():
    case = make_case([*run(3, 15, 16), *run(1, 0, 1), *run(6, 7, 8), *run(2, 8, 9), 0, 0, 0])
    check(case, simulate(case))


def test_chunks_across_blocks_after_decodes_agree_with_numpy():
    decodes = [*run(2, 6, 7), *run(1, 3, 4)]
    chunk = [*run(5, 13, 16), *run(3, 0, 16), *run(6, 0, 11)]
    case = make_case([*decodes, *chunk, *run(4, 3, 6), 0, 0])
    check(case, simulate(case))


def test_a_single_token_agrees_with_numpy():
    case = make_case(run(4, 9, 10), num_tokens=1)
    check(case, simulate(case))


def test_nothing_but_padding_changes_nothing():
    case = make_case([0, 5, 0])
    check(case, simulate(case))


def test_blocks_that_the_pool_does_not_have_are_left_out():
    case = make_case([-1, P * S, *run(2, 1, 3), P * S + 40, -70])
    check(case, simulate(case))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_every_dtype_keeps_its_bits(dtype: str):
    case = make_case([*run(2, 4, 5), *run(5, 5, 12), *run(1, 6, 7), 0], dtype=dtype)
    check(case, simulate(case))


@pytest.mark.parametrize("shape", [(4, 1, 8, 80), (4, 5, 128, 96), (4, 3, 24, 64)])
def test_heads_and_blocks_of_any_size_agree_with_numpy(shape: tuple[int, int, int, int]):
    S = shape[2]
    slots = [S + 2, *range(3 * S - 3, 3 * S + 2)]
    case = make_case(slots, shape=shape, dtype="bfloat16")
    check(case, simulate(case))


def test_more_items_than_buffers_agree_with_numpy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write, "MAX_BUFFERS", 4)
    slots = [slot * 8 + slot % 5 for slot in range(2, 13)]
    case = make_case(slots)
    check(case, simulate(case, write.write_kv))
    check(case, simulate(case, write.write_kv, dma_execution_mode="eager"))


def test_a_run_goes_on_in_the_next_tile_and_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write, "MAX_TILE_TOKENS", 8)
    monkeypatch.setattr(write, "MAX_CALL_TOKENS", 16)
    case = make_case([*run(6, 2, 4), *run(2, 5, 16), *run(4, 0, 6), 0], num_tokens=20)
    check(case, simulate(case, write.write_kv))


# Items of two groups in turns; of the two tokens of slot 41 the last one stays.
ODD_ORDER = [16, 41, 17, 40, 0, 18, 21, 42, 41]
# The last item's group is the first's, which has been merged but not stored when it is fetched.
FAR_APART = [16, 41, 80, 17]


@pytest.mark.parametrize("slots", [ODD_ORDER, FAR_APART])
def test_items_of_one_group_are_written_in_order(slots: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write, "MAX_BUFFERS", 4)
    case = make_case(slots)
    check(case, simulate(case, write.write_kv))


@pytest.mark.parametrize("slots", [ODD_ORDER, FAR_APART], ids=["before", "while"])
def test_a_group_fetched_before_it_is_stored_is_found_to_race(
    slots: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(write, "MAX_BUFFERS", 4)
    monkeypatch.setattr(write, "_named_before", lambda groups, starts: starts & False)
    case = make_case(slots)
    outcome = simulate(case, write.write_kv)
    assert outcome.raced
    assert differ(case, outcome).any()


def test_not_to_wait_for_copies_gives_other_slots(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write, "_wait", lambda copy: None)
    # JAX keeps what it made of a kernel: another function is another kernel.
    monkeypatch.setattr(write, "_write_kernel", functools.partial(write._write_kernel))
    case = make_case([*run(2, 4, 5), *run(5, 5, 12)])
    assert differ(case, simulate(case, write.write_kv)).any()


def test_a_group_that_is_all_new_is_not_fetched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write, "_merge", lambda *_: None)  # what is stored is what was fetched
    monkeypatch.setattr(write, "_write_kernel", functools.partial(write._write_kernel))
    waits = [*run(4, 1, 3), *run(4, 0, 8)]  # the second item of a group
    case = make_case([*run(2, 0, 8), *run(5, 8, 15), *waits])
    case = case._replace(pool=jnp.zeros_like(case.pool))
    # Eager: a copy that nobody waits for comes too.
    out = simulate(case, write.write_kv, dma_execution_mode="eager").out
    expected = np.zeros_like(case.expected)
    expected[2, :, :8] = expected[4, :, :8] = np.nan  # of a buffer that nothing has come to
    np.testing.assert_array_equal(out, expected)


def test_parts_of_a_large_write_are_made_one_after_the_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write, "MAX_CALL_TOKENS", 16)
    for num_tokens, num_parts in [(16, 1), (17, 2), (48, 3)]:
        case = make_case([], num_tokens=num_tokens)
        traced = jax.make_jaxpr(functools.partial(write.write_kv, interpret=True))
        equations = traced(case.pool, case.kv, case.slots).eqns
        barriers = [each for each in equations if each.primitive.name == "optimization_barrier"]
        assert len(barriers) == num_parts - 1
        used = [id(var) for each in equations for var in each.invars]
        assert all(id(var) in used for barrier in barriers for var in barrier.outvars)


@hypothesis.settings(max_examples=12)
@hypothesis.given(st.lists(st.tuples(st.integers(0, P * S + 3), st.integers(1, 11)), max_size=6))
def test_any_runs_in_any_order_agree_with_numpy(runs: list[tuple[int, int]]):
    slots = [slot for start, length in runs for slot in range(start, start + length)]
    case = make_case(slots[:48])
    check(case, simulate(case))


def test_a_jitted_step_writes_by_plain_interpret():
    case = make_case([*run(2, 4, 5), *run(5, 5, 12), 0])
    step = jax.jit(functools.partial(write_kv, backend=Backend.PALLAS_TPU_INTERPRET))
    out = step(case.pool, case.kv[..., :H], case.kv[..., H:], case.slots)
    check(case, Outcome(np.asarray(out), raced=False))


def test_a_wrong_shape_is_refused_by_the_annotations():
    case = make_case([9, 4], num_tokens=2)
    with pytest.raises(TypeCheckError):
        write.write_kv(case.pool, case.kv, case.slots[:1])


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (jnp.zeros((4, K, 12, 2 * H)), "multiple of 8, got 12"),
        (jnp.zeros((4, K, 8, 2 * H), jnp.int16), "got int16"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(pool: jax.Array, message: str):
    case = make_case([9, 4], num_tokens=2)
    with pytest.raises(ValueError, match=message):
        write.write_kv(pool, case.kv, case.slots)


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "options"),
    [
        ("v5e", {"heads": (8, 128)}),
        ("v6e", {"heads": (3, 64), "dtype": "float8_e4m3fn", "num_tokens": 1}),
    ],
    ids=["v5e", "v6e"],
)
def test_the_donated_pool_is_written_in_place(chip: str, options: dict[str, Any]):
    check_compiled(chip, options)


@needs_libtpu
@pytest.mark.kernels
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    "options",
    [
        {"heads": (3, 64), "block_size": 8},
        {"heads": (32, 128), "num_tokens": 8192},
        {"heads": (8, 256), "block_size": 128},
    ],
    ids=["3x64", "32x128", "8x256"],
)
def test_every_chip_and_dtype_compiles(chip: str, dtype: str, options: dict[str, Any]):
    if chip == "tpu7x":  # many: XLA copies them in ways whose HLO jaxlib 0.10 cannot read back
        options = {**options, "num_tokens": 64}
    check_compiled(chip, {"dtype": dtype, **options})


@needs_libtpu
@pytest.mark.kernels
@pytest.mark.parametrize("heads", [(5, 80), (1, 96)])
def test_head_sizes_that_leave_lanes_empty_compile(heads: tuple[int, int]):
    compile_for_tpu(f"{__name__}:build_write", options={"heads": heads})


def check_compiled(chip: str, options: dict[str, Any]) -> None:
    compiled = compile_for_tpu(f"{__name__}:build_write", chip=chip, options=options)
    pool = build_write(**options)[1][0]
    assert compiled.alias_bytes == math.prod(pool.shape) * pool.dtype.itemsize
    shape_text = re.escape(f"[{','.join(map(str, pool.shape))}]")
    assert not re.search(rf" = \w+{shape_text}\S* (copy|fusion|transpose|convert)", compiled.hlo)
    assert not re.search(r"\b(scatter|while)\b", compiled.hlo)
    assert 'custom_call_target="tpu_custom_call"' in compiled.hlo
    num_tokens, *heads = build_write(**options)[1][1].shape
    num_tokens = min(num_tokens, write.MAX_CALL_TOKENS)
    tile = write._tile_tokens(num_tokens, 4 * heads[0] * whole_lanes(heads[1]))
    rows = -(-num_tokens // tile) * (tile + 2 * write.GROUP)  # each tile is padded at both ends
    assert compiled.temporary_bytes < 6 * 4 * math.prod(heads) * rows + (1 << 20)


def build_write(
    *,
    num_tokens: int = 256,
    heads: tuple[int, int] = (8, 128),
    block_size: int = 16,
    dtype: str = "bfloat16",
    num_blocks: int = 4096,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Writing into a donated pool, for `compile_for_tpu`."""
    K, H = heads
    shape = pool_shape(num_blocks=num_blocks, num_kv_heads=K, block_size=block_size, head_size=H)
    kv = jax.ShapeDtypeStruct((num_tokens, K, 2 * H), dtype)
    slots = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    return jax.jit(write.write_kv, donate_argnums=0), (
        jax.ShapeDtypeStruct(shape, dtype),
        kv,
        slots,
    )
