"""The benchmark of attention alone: counts by hand, every side's figures, what it refuses."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernels
from benchmarks.attention_shapes import AttentionShape
from benchmarks.attention_sides import CONTIGUOUS, contiguous_attention
from pallas_kernels import default_backend
from tests.helpers import TOLERANCES, assert_close

FIGURES = {"ms", "min_ms", "share", "gbps", "gflops", "others_share"}
ROOF = {"kv_bytes", "flops", "read_gbps", "products_gflops", "roof_ms"}


@pytest.fixture
def small_roof(monkeypatch: pytest.MonkeyPatch):
    """Arrays that are read and multiplied in no time; nobody looks at the rates."""
    monkeypatch.setattr("benchmarks.roof.READ_BYTES", 2**16)
    monkeypatch.setattr("benchmarks.kernels.READ_BYTES", 2**16)
    monkeypatch.setattr("benchmarks.roof.PRODUCT_SIZE", {"cpu": 32})


def test_bytes_and_operations_are_those_of_what_the_queries_see():
    def shape(rows: int, queries: int, context: int) -> AttentionShape:
        return AttentionShape(
            rows=rows,
            queries=queries,
            context=context,
            heads=(6, 3, 16),
            dtype="bfloat16",
            block_size=8,
        )

    decode, chunk = shape(5, 1, 9), shape(1, 4, 7)
    assert (decode.name, chunk.name) == ("decode 5x9", "prefill 4@3")
    assert decode.kv_bytes == 5 * 9 * 3 * 2 * 16 * 2
    assert decode.flops == 2 * 2 * 6 * 16 * 5 * 9
    assert chunk.flops == 2 * 2 * 6 * 16 * (4 + 5 + 6 + 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contiguous_attention_lets_each_query_see_what_is_before_it(dtype: str):
    B, Q, N, K, H, C = 2, 4, 6, 3, 5, 7
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((B * Q, N, H), (B, K, C, H), (B, K, C, H))
    ]
    q, *kv = arrays
    attend = jax.jit(functools.partial(contiguous_attention, queries=Q, scale=0.3))
    out = np.asarray(attend(q, tuple(kv)), np.float64)
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    for b in range(B):
        for t in range(Q):
            for n in range(N):
                end, head = C - Q + t + 1, n // (N // K)
                weights = np.exp(k[b, head, :end] @ q[b * Q + t, n] * 0.3)
                expected = weights / weights.sum() @ v[b, head, :end]
                found = out[b * Q + t, n]
                assert_close(found, expected, TOLERANCES[dtype].attention)


@pytest.mark.usefixtures("small_roof")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_every_side_of_every_shape_has_its_figures(dtype, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    command = (
        f"kernels --decode 3x21 --prefill 5@13 --heads 6/3/16 --dtype {dtype} --block-size 8 "
        f"--layers 2 --repeats 2 --plot {plot}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    kernels.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [result["shape"] for result in report["results"]]
    assert names == ["decode 3x21", "prefill 5@13"]
    for result in report["results"]:
        sides = result["sides"]
        assert set(sides) == {"xla", default_backend().value, CONTIGUOUS}
        assert all(result[name] > 0 for name in ROOF)
        for name, side in sides.items():
            assert side.keys() >= FIGURES
            assert side["share"] > 0
            assert side["ms"] >= side["min_ms"] > 0
            assert ("error" in side) == (name != CONTIGUOUS)
    assert "needs a gpu" in report["refused"]["pallas-gpu"]
    assert {"versions", "device", "command"} <= report.keys()
    assert plot.stat().st_size > 10_000


@pytest.mark.usefixtures("small_roof")
def test_a_backend_that_does_not_take_the_pool_is_left_out(monkeypatch, capsys):
    command = "kernels --decode 2x9 --prefill --heads 2/1/8 --dtype float16 --layers 1 --repeats 1"
    monkeypatch.setattr(sys, "argv", command.split())
    kernels.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["results"][0]["sides"]) == {"xla", CONTIGUOUS}
    assert "cpu" in report["refused"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--decode 8", "expected BxC (rows x context tokens), got '8'"),
        ("--decode 0x9", "expected BxC (rows x context tokens), got '0x9'"),
        ("--prefill 9", "expected Q@P (a chunk's queries @ the position of its first), got '9'"),
        ("--decode --prefill", "nothing to time: give --decode or --prefill a shape"),
        ("--heads 9/2/64", "query heads must be a multiple of KV heads"),
        ("--dtype float8", "invalid choice: 'float8'"),
        ("--block-size 24", "invalid choice: 24"),
        ("--layers 0", "expected a number of at least 1, got '0'"),
        ("--repeats x", "expected a number of at least 1, got 'x'"),
        ("--plot nowhere/a.png", "expected a file in a folder that exists"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_timed(
    option: str, message: str, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["kernels", *option.split()])
    with pytest.raises(SystemExit):
        kernels.main()
    assert message in " ".join(capsys.readouterr().err.split())
