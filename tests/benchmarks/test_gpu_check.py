"""The check of a GPU works where there is none: its oracle, its parts at toy sizes, its command."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.gpu import (
    candidates,
    correctness,
    decode,
    parity,
    prefill,
    step,
    throughput,
    writes,
)
from benchmarks.gpu.beside import refusal, second_backend
from benchmarks.gpu.candidates import read
from benchmarks.gpu.chips import GPUS
from benchmarks.gpu.oracle import SCALE, dense, make_ragged
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.table import part_lines
from pallas_kernels import Backend
from pallas_kernels.gpu.mosaic.limits import MIN_JAX, missing_jax
from tests.helpers import assert_close
from tests.kernels import cases
from tests.kernels.test_backends import Gpu, use

SETTINGS = Settings(backend="xla", scale="toy", seed=3, candidates=[], read_gbps=10.0)
ON_A_GPU = dataclasses.replace(SETTINGS, backend="pallas-gpu", scale="full")
CUTS = pathlib.Path(candidates.__file__).with_name("mosaic_candidates.json")
SWIZZLED = correctness.Spec(job="decode", heads=(4, 2, 64), options={"window": 20})


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> list[Backend]:
    """As on Hopper, but for the kernels, which are `xla`'s: which were asked for, in order."""
    asked: list[Backend] = []

    def by_xla(attend: Any) -> Any:
        def call(*arrays: Any, backend: Backend, **options: Any) -> jax.Array:
            asked.append(backend)
            return attend(*arrays, backend=Backend.XLA, **options)

        return call

    for module in (correctness, decode, prefill):
        monkeypatch.setattr(module, "second_backend", lambda *_: Backend.MOSAIC_GPU)
        for name in {"paged_decode", "paged_attention"} & set(vars(module)):
            monkeypatch.setattr(module, name, by_xla(getattr(module, name)))
    return asked


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"window": 21, "soft_cap": 2.0}], ids=str)
def test_the_oracle_equals_the_tests_own(options: dict):
    ragged = make_ragged(
        [(1, 17), (5, 30), (7, 7)], heads=(6, 3, 16), block_size=8, dtype="float32", seed=1
    )
    case = cases.make_case([(1, 17), (5, 30), (7, 7)])
    case = cases.Case(ragged.q, ragged.pool, case.batch, list(ragged.contexts))
    assert cases.SCALE == SCALE
    expected = cases.dense(case, **options)[: len(ragged.q) - 3]
    assert_close(dense(ragged, **options), expected, 1e-12)


@pytest.mark.parametrize("module", [correctness, decode, prefill], ids=lambda m: m.__name__)
def test_a_part_records_figures_that_are_right(module):
    found: dict[str, dict] = {}
    module.run(SETTINGS, found.__setitem__)
    assert found
    assert all(result["ok"] for result in found.values()), found
    assert any("error_norm" in result for result in found.values())
    json.dumps(found)


def test_writes_are_timed_every_way_and_are_right():
    settings = dataclasses.replace(SETTINGS, backend="pallas-gpu-interpret")
    found: dict[str, dict] = {}
    writes.run(settings, found.__setitem__)
    assert {name.split()[-1] for name in found} == {
        "kernel",
        "scatter",
        "repeated",
        "xla",
        settings.backend,
    }
    assert all(result["ok"] and result["us"] > 0 for result in found.values()), found
    json.dumps(found)


def test_a_write_to_a_wrong_slot_is_found(monkeypatch: pytest.MonkeyPatch):
    right = writes.write_by_kernel
    monkeypatch.setattr(
        writes,
        "write_by_kernel",
        lambda pool, k, v, slots, **rest: right(pool, k, v, slots ^ 1, **rest),
    )
    settings = dataclasses.replace(SETTINGS, backend="pallas-gpu-interpret", only="5 bfloat16")
    found: dict[str, dict] = {}
    writes.run(settings, found.__setitem__)
    wrong = [name for name, result in found.items() if not result["ok"]]
    assert wrong == [name for name in found if name.endswith("kernel")]


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch):
    right, (decode_spec, _) = correctness.paged_decode, correctness._specs("toy")
    monkeypatch.setattr(correctness, "_specs", lambda scale: [decode_spec])
    monkeypatch.setattr(
        correctness, "paged_decode", lambda *args, **kwargs: 1.05 * right(*args, **kwargs)
    )
    found: dict[str, dict] = {}
    correctness.run(SETTINGS, found.__setitem__)
    wrong = [name for name, result in found.items() if not result["ok"]]
    assert wrong == [name for name in found if name.startswith("decode")]


def test_hopper_brings_a_second_backend_and_other_gpus_say_why_not(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(jax, "__version_info__", MIN_JAX)
    found: dict[str, dict] = {}
    use(monkeypatch, Gpu("9.0"))
    assert second_backend(ON_A_GPU, found.__setitem__) is Backend.MOSAIC_GPU
    for name in ("xla", "mosaic-gpu"):
        other = dataclasses.replace(ON_A_GPU, backend=name)
        assert second_backend(other, found.__setitem__) is None
    assert not found, "nothing is said where nothing is missing"
    use(monkeypatch, Gpu("10.0"))
    assert second_backend(ON_A_GPU, found.__setitem__) is None
    assert found["mosaic-gpu"]["ok"]
    assert "9.0 (Hopper), Tesla T4 has 10.0" in found["mosaic-gpu"]["error"]


def test_a_jax_without_the_second_backend_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 9))
    use(monkeypatch, Gpu("9.0"))
    found: dict[str, dict] = {}
    assert second_backend(ON_A_GPU, found.__setitem__) is None
    assert found["mosaic-gpu"]["ok"]
    assert "they need JAX 0.11" in found["mosaic-gpu"]["error"]


def test_cases_that_the_second_backend_takes_are_run_by_both(
    monkeypatch: pytest.MonkeyPatch, both: list[Backend]
):
    ragged = dataclasses.replace(SWIZZLED, job="ragged")
    exact = dataclasses.replace(SWIZZLED, dtype="float32")
    wide = dataclasses.replace(SWIZZLED, heads=(4, 2, 96))
    specs = [SWIZZLED, ragged, exact, wide]
    monkeypatch.setattr(correctness, "_specs", lambda scale: specs)
    found: dict[str, dict] = {}
    correctness.run(SETTINGS, found.__setitem__)
    first, second = [spec.name for spec in specs], [SWIZZLED.name, ragged.name]
    names = [name for name in found if name.startswith(("decode", "ragged"))]
    assert names == [*first, *(f"{name} mosaic-gpu" for name in second)]
    assert sum("write_kv" in name or "copy_blocks" in name for name in found) == 4
    assert all(result["ok"] for result in found.values()), found
    assert found["cases of mosaic-gpu"]["error"] == "2 of 4 cases are not for it"
    assert both == [Backend.XLA] * 4 + [Backend.MOSAIC_GPU] * 2


def test_every_option_size_and_job_has_a_case_for_the_second_backend():
    taken = [
        spec for spec in correctness._specs("full") if correctness._takes(Backend.MOSAIC_GPU, spec)
    ]
    for job in ("decode", "ragged"):
        mine = [spec for spec in taken if spec.job == job]
        assert {spec.heads for spec in mine} == {(32, 8, 128), (9, 3, 64), (14, 2, 64)}
        assert {spec.block_size for spec in mine} == {8, 16, 64, 128}
        assert {spec.dtype for spec in mine} == {"bfloat16", "float16"}
        assert all(options in [spec.options for spec in mine] for options in correctness.OPTIONS)


@pytest.mark.parametrize("how", ["wrong", "raises", "does not compile"])
def test_a_second_backend_that_fails_leaves_the_first_its_cases(
    monkeypatch: pytest.MonkeyPatch, both: list[Backend], how: str
):
    right, check = correctness.paged_decode, correctness._check

    def attend(*arrays: Any, backend: Backend, **options: Any) -> jax.Array:
        if backend is Backend.MOSAIC_GPU and how == "does not compile":
            raise ValueError("planted")
        factor = 1.05 if backend is Backend.MOSAIC_GPU and how == "wrong" else 1.0
        return factor * right(*arrays, backend=backend, **options)

    def run_or_raise(*arguments: Any) -> dict:
        if both[-1] is Backend.MOSAIC_GPU and how == "raises":
            raise RuntimeError("planted")
        return check(*arguments)

    monkeypatch.setattr(correctness, "_specs", lambda scale: [SWIZZLED])
    monkeypatch.setattr(correctness, "paged_decode", attend)
    monkeypatch.setattr(correctness, "_check", run_or_raise)
    found: dict[str, dict] = {}
    correctness.run(SETTINGS, found.__setitem__)
    wrong = [name for name, result in found.items() if not result["ok"]]
    assert wrong == [f"{SWIZZLED.name} mosaic-gpu"]


@pytest.mark.parametrize(
    "module",
    [pytest.param(decode, marks=pytest.mark.kernels), prefill],
    ids=lambda module: module.__name__,
)
def test_the_second_backend_is_a_side_that_comes_last_and_may_not_fail(
    monkeypatch: pytest.MonkeyPatch, both: list[Backend], module: Any
):
    paged, measure = module.paged, module.measure
    found: dict[str, dict] = {}
    module.run(SETTINGS, found.__setitem__)
    (shape,) = module.SHAPES["toy"]
    mine = f"{shape.name} mosaic-gpu"
    assert list(found)[-1] == mine
    assert found[mine]["us"] > 0
    assert found[mine]["error_norm"] < 1e-2
    assert Backend.MOSAIC_GPU in both

    def breaks(shape: Any, backend: str) -> Any:
        attend = paged(shape, backend)
        return lambda *arrays: 2.0 * attend(*arrays)

    def measure_second(shapes: Any, *rest: Any) -> None:
        if list(shapes[shape]) == ["mosaic-gpu"]:
            measure(shapes, *rest)

    monkeypatch.setattr(module, "paged", breaks)
    monkeypatch.setattr(module, "measure", measure_second)
    again: dict[str, dict] = {}
    module.run(SETTINGS, again.__setitem__)
    assert [(name, result["ok"]) for name, result in again.items()] == [(mine, False)]


def test_parity_names_the_dtype_that_the_kernels_do_not_take():
    workload = parity.WORKLOADS["full"]
    found: dict[str, dict] = {}
    taken = parity._dtypes(workload, Backend.MOSAIC_GPU, found.__setitem__)
    assert list(taken) == [("bfloat16", None)]
    assert list(found) == ["float32 tokens"]
    assert found["float32 tokens"]["ok"]
    assert "got float32" in found["float32 tokens"]["error"]
    found.clear()
    taken = parity._dtypes(workload, Backend.XLA, found.__setitem__)
    assert list(taken) == list(parity.DTYPES)
    assert not found


def test_what_is_timed_in_full_is_for_the_second_backend_too():
    pools = [
        (shape.block_size, shape.dtype, shape.heads[2])
        for shape in [*decode.SHAPES["full"], *prefill.SHAPES["full"]]
    ]
    pools += [
        (step.BLOCK_SIZE, step.DTYPE, shape.config["head_dim"]) for shape in step.SHAPES["full"]
    ]
    load = throughput.LOADS["full"]
    pools.append((throughput.BLOCK_SIZE, throughput.DTYPE, load.config["head_dim"]))
    for block_size, dtype, head_size in pools:
        given = {"block_size": block_size, "dtype": dtype, "head_size": head_size}
        assert refusal(Backend.MOSAIC_GPU, **given) is None, given


def test_the_command_resumes_and_fails_where_a_part_does(tmp_path: pathlib.Path):
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--scale", "toy", "--resume"]
    command += ["--out", str(path), "--parts", "ceiling", "--backend"]
    assert subprocess.run([*command, "xla"], check=False).returncode == 0
    report = json.loads(path.read_text())
    assert report["parts"]["ceiling"]["status"] == "done"
    report["parts"]["ceiling"]["results"]["copy"] = {"ok": False, "error": "planted"}
    path.write_text(json.dumps(report))
    assert subprocess.run([*command, "xla"], check=False).returncode == 1
    assert json.loads(path.read_text())["parts"] == report["parts"], "it ran again"


def test_a_table_shows_what_failed_and_what_is_absent():
    found = {
        "status": "done",
        "seconds": 1.0,
        "results": {
            "right": {"ok": True, "us": 4.0, "min_us": 3.9, "max_us": 4.1, "gbps": 1000.0},
            "wrong": {"ok": False, "error": "over the bound", "error_norm": 0.5},
            "absent": {"ok": True, "error": "not installed"},
        },
    }
    text = "\n".join(part_lines("decode", found))
    assert "2 ok, 1 FAILED" in text
    assert "right: 4.0 us 1000 GB/s" in text
    assert "FAILED wrong: over the bound" in text
    assert "absent: none: not installed" in text


def test_candidates_are_read_in_either_form():
    keyed = {"6/3/16": [{"tile_tokens": 32}], "9/3/64": [{"tile_tokens": 64, "num_warps": 4}]}
    listed = [{"heads": [6, 3, 16], "tile_tokens": 32}, {"query_rows": 16}]
    found = [*read(keyed), *read(listed)]
    heads = [one.pop("heads", None) for one in found]
    assert heads == [(6, 3, 16), (9, 3, 64), (6, 3, 16), None]
    assert found[1] == {"tile_tokens": 64, "num_warps": 4}


def test_candidates_go_to_the_kernel_they_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    path = tmp_path / "cuts.json"
    old = {"tile_tokens": 32, "split_tokens": 256, "num_warps": 4}
    new = {"tile_tokens": 64, "split_tokens": 256, "num_stages": 3}
    path.write_text(json.dumps({"6/3/16": [old, {"kernel": "mosaic decode", **new}]}))
    timed: dict[str, set[str]] = {}

    def time_decode(_: Any, configs: dict[str, Any], *rest: Any, kernel: Any = None) -> Any:
        assert rest == (settings,)
        module = "" if kernel is None else kernel.__module__
        timed[module] = {type(config).__name__ for config in configs.values() if config is not None}
        return {name: {"ok": True, "us": 1.0} for name in configs}

    monkeypatch.setattr(candidates, "time_decode", time_decode)
    settings = dataclasses.replace(SETTINGS, candidates=[str(path)])
    found: dict[str, dict] = {}
    if missing_jax(interpreted=False) is not None:
        with pytest.raises(ValueError, match=r"for no kernel here.*mosaic decode"):
            candidates.run(settings, found.__setitem__)
        return
    candidates.run(settings, found.__setitem__)
    assert timed == {
        "": {"DecodeConfig"},
        "pallas_kernels.gpu.mosaic.decode": {"MosaicDecodeConfig"},
    }
    assert list(found) == ["decode 6/3/16 3 x 40", "mosaic decode 6/3/16 3 x 40"]


def test_the_cuts_for_hopper_fit_its_shared_memory():
    cuts = list(read(json.loads(CUTS.read_text())))
    assert {cut["kernel"] for cut in cuts} == {"mosaic decode", "mosaic prefill"}
    for cut in cuts:
        H = cut["heads"][2]
        # 64 queries of 16 bits twice, and results: of float32, or twice of 16 bits.
        shared_bytes = 2 * 64 * H * 2 + 64 * H * 4 + 1024
        tokens = cut.get("tile_tokens", cut.get("context_tokens"))
        shared_bytes += cut["num_stages"] * tokens * 4 * H
        assert shared_bytes <= GPUS["sm_90a"].most_shared_bytes, cut


@pytest.mark.skipif(missing_jax(interpreted=False) is not None, reason="it has no such kernels")
def test_the_cuts_for_hopper_are_the_kernels_own_and_none_is_the_default():
    from pallas_kernels.gpu.mosaic.decode import decode_config
    from pallas_kernels.gpu.mosaic.prefill import prefill_config

    cuts = list(read(json.loads(CUTS.read_text())))
    for kernel in candidates._kernels(ON_A_GPU):
        mine = [cut for cut in cuts if kernel.takes(cut)]
        assert bool(mine) == kernel.name.startswith("mosaic")
        assert kernel.takes({"num_stages": 3}) != kernel.name.startswith("mosaic"), "no name"
        for heads in {cut["heads"] for cut in mine}:
            default = (decode_config if "decode" in kernel.name else prefill_config)(heads[2])
            configs = candidates._configs(kernel.config_class, mine, heads)
            assert default not in configs.values()
            assert len(configs) == 1 + sum(cut["heads"] == heads for cut in mine)
            assert heads in {shape.heads for shape in kernel.shapes}


def test_ragged_rows_own_every_block_once_and_nothing_else_is_finite():
    ragged = make_ragged([(1, 9), (3, 20)], heads=(2, 1, 4), block_size=4, dtype="float16", seed=0)
    used = ragged.block_tables[ragged.block_tables > 0]
    assert len(set(used.tolist())) == len(used) == 8
    assert np.isfinite(ragged.pool.astype(np.float32)).sum() == (9 + 20) * 8
