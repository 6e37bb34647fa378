"""The table of TPU tiles: what is looked up, what is cut, and that every entry compiles."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.tpu import whole
from benchmarks.tpu.topology import TOPOLOGIES, compile_for_tpu, missing_libtpu
from pallas_kernels import pool_shape
from pallas_kernels.tpu import DecodeTile, RaggedTile, decode, ragged, tiles

TILES = {"decode": DecodeTile, "prefill": RaggedTile}
FIGURES = {"compiler estimate": "cycles", "wall time": "us"}
NAMES = sorted(tiles.read_table())
SPOT_CHECKS = NAMES[:: max(1, len(NAMES) // 3)][:3]
needs_libtpu = pytest.mark.skipif(missing_libtpu() is not None, reason=missing_libtpu() or "")


def arrays(
    *, num_tokens: int = 48, block_size: int = 8, dtype: str = "bfloat16"
) -> tuple[jax.Array, jax.Array]:
    """Queries and a pool of 6 query heads, 3 KV heads and head size 64."""
    shape = pool_shape(num_blocks=5, num_kv_heads=3, block_size=block_size, head_size=64)
    return jnp.zeros((num_tokens, 6, 64), "bfloat16"), jnp.zeros(shape, dtype)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A table of one entry a kernel, while v6e is compiled for."""
    entries = {
        "decode v6e 6/3/64 bfloat16 8": {"tile": {"blocks": 32, "ring": 4}},
        "prefill v6e 6/3/64 bfloat16 8": {"tile": {"tokens": 32, "blocks": 64, "ring": 2}},
    }
    monkeypatch.setattr(tiles, "read_table", lambda: entries)
    monkeypatch.setattr(tiles, "target_chip", lambda: "v6e")
    return entries


@pytest.mark.usefixtures("table")
def test_an_entry_is_taken_as_it_is_where_the_arrays_are_large():
    q, pool = arrays()
    assert decode.choose_tile(q, pool, 500) == DecodeTile(blocks=32, ring=4)
    assert ragged.choose_tile(q, pool, 500) == RaggedTile(tokens=32, blocks=64, ring=2)


@pytest.mark.usefixtures("table")
def test_a_tile_is_no_longer_than_a_block_table_nor_than_the_tokens():
    q, pool = arrays(num_tokens=9)
    assert decode.choose_tile(q, pool, 20).blocks == 32
    assert decode.choose_tile(q, pool, 3).blocks == 16  # 128 tokens are a register
    assert ragged.choose_tile(q, pool, 20) == RaggedTile(tokens=16, blocks=32, ring=2)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("other", [{"block_size": 16}, {"dtype": "float32"}], ids=str)
def test_other_pools_are_cut_by_formula(other: dict[str, Any]):
    q, pool = arrays(**other)
    assert decode.choose_tile(q, pool, 50) == decode.default_tile(pool, 50, 2)
    assert ragged.choose_tile(q, pool, 50) == ragged.default_tile(q, pool)


@pytest.mark.usefixtures("table")
def test_other_heads_are_cut_by_formula():
    q, pool = arrays()
    assert decode.choose_tile(q[:, :3], pool, 50) == decode.default_tile(pool, 50, 1)
    assert ragged.choose_tile(q[:, :3], pool, 50) == ragged.default_tile(q[:, :3], pool)


@pytest.mark.usefixtures("table")
def test_float32_queries_do_not_fit_a_query_tile_of_the_table():
    q, pool = arrays()
    q = q.astype(jnp.float32)
    assert ragged.choose_tile(q, pool, 500) == ragged.default_tile(q, pool)


@pytest.mark.usefixtures("table")
def test_a_chip_without_entries_is_cut_by_formula(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "target_chip", lambda: "v4")
    q, pool = arrays()
    assert decode.choose_tile(q, pool, 50) == decode.default_tile(pool, 50, 2)


def test_where_there_is_no_tpu_the_table_is_not_asked(
    table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.undo()
    monkeypatch.setattr(tiles, "read_table", lambda: table)
    q, pool = arrays()
    assert tiles.target_chip() is None
    assert tiles.tuned_tile("decode", heads=(6, 3, 64), pool=pool) is None
    assert decode.choose_tile(q, pool, 50) == decode.default_tile(pool, 50, 2)


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_of_the_table_is_a_tile_and_says_where_it_is_from(name: str):
    kernel, chip, heads, dtype, block_size = name.split()
    N, K, H = map(int, heads.split("/"))
    entry = tiles.read_table()[name]
    key = {"chip": chip, "heads": (N, K, H), "dtype": dtype, "block_size": int(block_size)}
    assert name == tiles.entry_name(kernel, **key)
    assert chip in TOPOLOGIES
    assert entry[FIGURES[entry["source"]]] > 0
    assert {"jax", "libtpu", "date"} <= set(entry)
    tile = TILES[kernel](**entry["tile"])
    kv_bytes = K * int(block_size) * 2 * H * jnp.dtype(dtype).itemsize
    assert tile.blocks * kv_bytes <= decode.MAX_TILE_BYTES


@needs_libtpu
@pytest.mark.parametrize("name", SPOT_CHECKS)
def test_an_entry_is_found_by_its_chip_and_fits_with_every_option(name: str):
    check_entry(name)


@needs_libtpu
@pytest.mark.kernels
@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_found_by_its_chip_and_fits_with_every_option(name: str):
    check_entry(name)


def check_entry(name: str) -> None:
    compiled = compile_for_tpu(
        f"{__name__}:build_entry", chip=name.split()[1], options={"name": name}
    )
    assert compiled.extra == [tiles.read_table()[name]["tile"]]


def build_entry(*, name: str) -> tuple[Any, ...]:
    """The kernel as a model of these heads meets it, and the tile that it takes."""
    kernel, _, heads, dtype, block_size = name.split()
    N, K, H = map(int, heads.split("/"))
    fields = {"kernel": kernel, "heads": (N, K, H), "dtype": dtype, "block_size": int(block_size)}
    call, arguments = whole.with_every_option(**fields, tile=None)
    module = decode if kernel == "decode" else ragged
    q, pool = arguments[:2]
    tile = module.choose_tile(q, pool, whole.CONTEXT // int(block_size))
    return call, arguments, dataclasses.asdict(tile)
