"""The table of GPU tiles: what is looked up for which device, and that every entry compiles."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu.builds import ATTENTION
from benchmarks.gpu.chips import GPUS
from benchmarks.gpu.static_rows import kernel_figures
from benchmarks.gpu.topology import abstract_mesh, compile_each_for_gpu, missing_cuda
from benchmarks.gpu.tuning import fits
from benchmarks.tables import WALL_TIME, Shape
from pallas_kernels import pool_shape
from pallas_kernels.gpu import device, ragged, tiles
from pallas_kernels.gpu.ragged import RaggedConfig
from pallas_kernels.gpu.tiles import DecodeConfig
from pallas_kernels.tuned import entry_name

DECODE = {"tile_tokens": 32, "split_tokens": 128, "num_warps": 2, "num_stages": 4}
PREFILL = {"query_rows": 32, "context_tokens": 16, "num_warps": 2, "num_stages": 2}
needs_compiler = pytest.mark.skipif(missing_cuda() is not None, reason=missing_cuda() or "")


def arrays(
    *, block_size: int = 8, dtype: str = "bfloat16", head_size: int = 64, num_tokens: int = 48
) -> tuple[jax.Array, jax.Array]:
    """Queries and a pool of 6 query heads and 3 KV heads."""
    shape = pool_shape(num_blocks=5, num_kv_heads=3, block_size=block_size, head_size=head_size)
    return jnp.zeros((num_tokens, 6, head_size), "bfloat16"), jnp.zeros(shape, dtype)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A table of one entry a kernel, for H100."""
    entries = {
        "decode H100 6/3/64 bfloat16 8": {"config": DECODE},
        "decode H100 6/3/64 int8 8": {"config": DECODE},
        "prefill H100 6/3/64 bfloat16 8": {"config": PREFILL},
    }
    monkeypatch.setattr(tiles, "read_table", lambda: entries)
    return entries


def choose(chip: str, **options: Any) -> tuple[DecodeConfig, RaggedConfig]:
    q, pool = arrays(**options)
    with jax.sharding.use_abstract_mesh(abstract_mesh(chip)):
        return tiles.choose_decode_config(q, pool), ragged.choose_config(q, pool)


def formulas(chip: str, **options: Any) -> tuple[DecodeConfig, RaggedConfig]:
    q, pool = arrays(**options)
    with jax.sharding.use_abstract_mesh(abstract_mesh(chip)):
        return tiles.default_decode_config(q, pool), ragged.default_config(q, pool)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("num_tokens", [1, 48])
def test_an_entry_is_taken_whatever_the_batch(num_tokens: int):
    expected = DecodeConfig(**DECODE), RaggedConfig(**PREFILL)
    assert choose("sm_90a", num_tokens=num_tokens) == expected


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    "other",
    [{"block_size": 16}, {"dtype": "float32"}, {"dtype": "int8"}, {"head_size": 32}],
    ids=str,
)
def test_what_has_no_entry_is_cut_by_formula(other: dict[str, Any]):
    assert choose("sm_90a", **other) == formulas("sm_90a", **other)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("chip", ["sm_80", "sm_89"])
def test_another_gpu_is_cut_by_formula(chip: str):
    assert choose(chip) == formulas(chip)


@pytest.mark.usefixtures("table")
def test_where_there_is_no_gpu_the_table_is_not_asked():
    q, pool = arrays()
    assert device.target_chip() is None
    assert tiles.choose_decode_config(q, pool) == tiles.default_decode_config(q, pool)
    assert ragged.choose_config(q, pool) == ragged.default_config(q, pool)


@pytest.mark.usefixtures("table")
def test_a_kernel_takes_the_tables_cut_unless_it_is_told_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "target_chip", lambda: "H100")
    split_tokens = []

    def max_splits(num_tokens: int, size: int, window: int | None) -> int:
        del num_tokens, window
        split_tokens.append(size)
        return 1

    decode = ATTENTION["decode"].build(heads=(6, 3, 64), block_size=8)
    monkeypatch.setattr("pallas_kernels.gpu.decode.max_splits", max_splits)
    function, arguments = decode
    own = DecodeConfig(tile_tokens=16, split_tokens=48)
    jax.eval_shape(lambda *each: function(*each, interpret=True), *arguments)
    jax.eval_shape(lambda *each: function(*each, interpret=True, config=own), *arguments)
    assert split_tokens == [128, 48]


@pytest.mark.usefixtures("table")
def test_so_does_the_kernel_for_prompts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "target_chip", lambda: "H100")
    query_tokens, list_tiles = [], ragged.list_tiles

    def listed(*arguments: Any, **sizes: int) -> jax.Array:
        query_tokens.append(sizes["query_tokens"])
        return list_tiles(*arguments, **sizes)

    monkeypatch.setattr(ragged, "list_tiles", listed)
    function, arguments = ATTENTION["prefill"].build(heads=(6, 3, 64), block_size=8)
    own = RaggedConfig(query_rows=16)
    jax.eval_shape(lambda *each: function(*each, interpret=True), *arguments)
    jax.eval_shape(lambda *each: function(*each, interpret=True, config=own), *arguments)
    assert query_tokens == [32 // 2, 16 // 2]


@pytest.mark.parametrize(
    ("kind", "chip", "capability"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", "9.0"),
        ("NVIDIA H100 PCIe", "H100", "9.0"),
        ("NVIDIA H200", "H200", "9.0"),
        ("NVIDIA A100-SXM4-40GB", "A100", "8.0"),
        ("NVIDIA L4", "L4", "8.9"),
        ("NVIDIA L40S", "L40S", "8.9"),
        ("NVIDIA GeForce RTX 4090", "GeForce-RTX-4090", None),
        ("TPU v5 lite", None, None),
        ("cpu", None, None),
    ],
)
def test_a_device_is_known_by_the_first_word_of_its_name(
    kind: str, chip: str | None, capability: str | None
):
    kinds = jax.sharding.AbstractDevice(kind, 132, "gpu")
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types, abstract_device=kinds)
    with jax.sharding.use_abstract_mesh(mesh):
        assert (device.target_chip(), device.target_capability()) == (chip, capability)


def test_a_device_that_is_there_says_its_capability_itself(monkeypatch: pytest.MonkeyPatch):
    class Found:
        device_kind = "NVIDIA GeForce RTX 4090"
        compute_capability = "8.9"

    monkeypatch.setattr(device.jax, "devices", lambda: [Found()])
    assert device.target_capability() == "8.9"


@pytest.mark.parametrize(
    ("chip", "stages", "narrow"), [("sm_80", 3, 32), ("sm_89", 2, 32), ("sm_90a", 3, 64)]
)
def test_the_formula_for_prompts_knows_each_gpus_limits(chip: str, stages: int, narrow: int):
    assert formulas(chip, head_size=128)[1].num_stages == stages
    assert formulas(chip)[1].context_tokens == narrow


def check_entry(name: str, entry: Mapping[str, Any]) -> None:
    """Its key is one that is looked up, its cut one that its kernel takes, its source a time."""
    kernel, chip, heads, dtype, block_size = name.split()
    N, K, H = map(int, heads.split("/"))
    key = {"chip": chip, "heads": (N, K, H), "dtype": dtype, "block_size": int(block_size)}
    assert name == entry_name(kernel, **key)
    assert chip in device.CAPABILITIES
    assert dtype == jnp.dtype(dtype).name
    assert entry["source"] == WALL_TIME
    assert 0 < entry["us"] < entry["formula_us"]
    assert {"jax", "date"} <= set(entry)
    config = ATTENTION[kernel].config_class(**entry["config"])
    assert getattr(config, "query_rows", N) >= N // K


def compiles(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether its cut keeps its registers and fits its chip, plain and with every option."""
    kernel, chip, heads, dtype, block_size = name.split()
    N, K, H = map(int, heads.split("/"))
    compiler = next(
        each for each, gpu in GPUS.items() if gpu.capability == device.CAPABILITIES[chip]
    )
    fields = {"heads": (N, K, H), "dtype": dtype, "block_size": int(block_size)}
    shape = Shape(kernel=kernel, chip=compiler, **fields)
    told = {"kernel": kernel, "config": entry["config"], **fields}
    found = compile_each_for_gpu(
        "benchmarks.gpu.builds:build_cut",
        chip=compiler,
        options=[{**told, "every_option": every} for every in (False, True)],
    )
    figures = [
        kernel_figures(one.kernel(name), compiler)
        for one in found
        if not isinstance(one, str)
        for name in ATTENTION[kernel].kernels[:1]
    ]
    return len(figures) == 2 and all(
        fits(shape, spilled_bytes=one["spilled_bytes"], shared_bytes=one["shared_bytes"])
        for one in figures
    )


def test_every_entry_is_a_cut_and_says_where_it_is_from():
    for name, entry in tiles.read_table().items():
        check_entry(name, entry)


GOOD = {"source": WALL_TIME, "us": 9.0, "formula_us": 10.0, "jax": "0.1", "date": "2026-11-27"}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("decode H100 6/3/64 bfloat16 8", {"config": {**DECODE, "tile_tokens": 48}}),
        ("decode H100 6/3/64 bfloat16 8", {"config": PREFILL}),
        ("decode H100 6/3/64 bfloat16 8", {"us": 11.0}),
        ("decode H100 6/3/64 bfloat16 8", {"source": "a guess"}),
        ("decode sm_90a 6/3/64 bfloat16 8", {}),
        ("prefill H100 64/1/64 bfloat16 8", {"config": PREFILL}),
    ],
)
def test_an_entry_that_no_kernel_could_take_is_found(name: str, changed: dict[str, Any]):
    check_entry("decode H100 6/3/64 bfloat16 8", {**GOOD, "config": DECODE})
    with pytest.raises((AssertionError, ValueError, TypeError)):
        check_entry(name, {**GOOD, "config": DECODE, **changed})


@pytest.mark.parametrize(
    ("capability", "tokens"),
    [("8.0", 32), ("8.9", 32), ("9.0", 64), ("10.0", 64), ("12.0", 32), ("12.1", 32)],
)
def test_small_heads_take_fewer_tokens_where_matrix_instructions_are_narrow(
    monkeypatch: pytest.MonkeyPatch, capability: str, tokens: int
):
    monkeypatch.setattr(ragged, "target_capability", lambda: capability)
    assert ragged.default_config(*arrays()).context_tokens == tokens


@needs_compiler
def test_every_entry_compiles_without_a_spilled_register():
    assert [name for name, entry in tiles.read_table().items() if not compiles(name, entry)] == []


@needs_compiler
@pytest.mark.parametrize(
    ("changed", "is_sound"),
    [
        ({}, True),
        ({"tile_tokens": 128, "split_tokens": 128, "num_stages": 8}, False),  # too large
        ({"tile_tokens": 128, "split_tokens": 128, "num_warps": 1}, False),  # spills
    ],
    ids=["sound", "too-large", "spills"],
)
def test_an_entry_that_spills_or_is_too_large_would_be_found(
    changed: dict[str, int], is_sound: bool
):
    entry = {"config": {**DECODE, **changed}}
    assert compiles("decode H100 32/8/128 bfloat16 16", entry) == is_sound
