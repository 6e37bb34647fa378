"""The check of a GPU works where there is none: its oracle, its parts at toy sizes, its command."""

import dataclasses
import functools
import json
from typing import Any, cast

import jax
import numpy as np
import pytest

from benchmarks.gpu import (
    changes,
    correctness,
    decode,
    large,
    mosaic,
    parity,
    prefill,
    serving,
    step,
    throughput,
)
from benchmarks.gpu.beside import refusal, second_backend
from benchmarks.gpu.oracle import NO_BLOCK, SCALE, dense, make_ragged
from benchmarks.gpu.settings import Record, Settings
from benchmarks.gpu.specs import MANY_ROWS, OPTIONS, Spec, list_specs, make_case
from jpaged import LLM
from pallas_kernels import Backend
from pallas_kernels.gpu.mosaic.limits import MIN_JAX
from tests.helpers import assert_close
from tests.kernels import cases
from tests.kernels.test_backends import Gpu, use

SETTINGS = Settings(backend="xla", scale="toy", seed=3, candidates=[], read_gbps=10.0)
ON_A_GPU = dataclasses.replace(SETTINGS, backend="pallas-gpu", scale="full")
SWIZZLED = Spec(job="decode", heads=(4, 2, 64), options={"window": 20})


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> list[Backend]:
    """As on Hopper, but for the kernels, which are another's: which were asked for, in order."""
    asked: list[Backend] = []

    def by(other: Backend, attend: Any) -> Any:
        def call(*arrays: Any, backend: Backend, **options: Any) -> jax.Array:
            asked.append(backend)
            return attend(*arrays, backend=other, **options)

        return call

    for module in (mosaic, correctness, decode, prefill):
        if module is not correctness:
            monkeypatch.setattr(module, "second_backend", lambda *_: Backend.MOSAIC_GPU)
        for name in {"paged_decode", "paged_attention"} & set(vars(module)):
            # Whose padding tokens are looked at.
            is_looked_at = module is correctness and name == "paged_attention"
            other = Backend.PALLAS_GPU_INTERPRET if is_looked_at else Backend.XLA
            monkeypatch.setattr(module, name, by(other, getattr(module, name)))
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
    record = Record()
    found = record.results
    module.run(SETTINGS, record)
    assert found
    assert all(result["ok"] for result in found.values()), found
    assert any("error_norm" in result for result in found.values())
    json.dumps(found)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch):
    right, (decode_spec, _) = correctness.paged_decode, list_specs("toy")
    monkeypatch.setattr(correctness, "list_specs", lambda scale: [decode_spec])
    monkeypatch.setattr(large, "cases", lambda *_: [])
    monkeypatch.setattr(
        correctness, "paged_decode", lambda *args, **kwargs: 1.05 * right(*args, **kwargs)
    )
    record = Record()
    found = record.results
    correctness.run(SETTINGS, record)
    wrong = [name for name, result in found.items() if not result["ok"]]
    assert wrong == [name for name in found if name.startswith("decode")]


def test_hopper_brings_a_second_backend_and_other_gpus_say_why_not(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(jax, "__version_info__", MIN_JAX)
    record = Record()
    found = record.results
    use(monkeypatch, Gpu("9.0"))
    assert second_backend(ON_A_GPU, record) is Backend.MOSAIC_GPU
    for name in ("xla", "mosaic-gpu"):
        other = dataclasses.replace(ON_A_GPU, backend=name)
        assert second_backend(other, record) is None
    assert not found, "nothing is said where nothing is missing"
    use(monkeypatch, Gpu("10.0"))
    assert second_backend(ON_A_GPU, record) is None
    assert found["mosaic-gpu"]["ok"]
    assert "9.0 (Hopper), Tesla T4 has 10.0" in found["mosaic-gpu"]["error"]


def test_a_jax_without_the_second_backend_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 9))
    use(monkeypatch, Gpu("9.0"))
    record = Record()
    found = record.results
    assert second_backend(ON_A_GPU, record) is None
    assert found["mosaic-gpu"]["ok"]
    assert "they need JAX 0.11" in found["mosaic-gpu"]["error"]


def test_cases_that_the_second_backend_takes_are_a_part_of_their_own(
    monkeypatch: pytest.MonkeyPatch, both: list[Backend]
):
    ragged = dataclasses.replace(SWIZZLED, job="ragged")
    exact = dataclasses.replace(SWIZZLED, dtype="float32")
    wide = dataclasses.replace(SWIZZLED, heads=(4, 2, 96))
    many = dataclasses.replace(SWIZZLED, heads=(130, 2, 64))
    specs = [SWIZZLED, ragged, exact, wide, many]
    monkeypatch.setattr(correctness, "list_specs", lambda scale: specs)
    monkeypatch.setattr(large, "cases", lambda *_: [])
    monkeypatch.setattr(parity, "check_tokens", lambda *_: None)
    record = Record()
    correctness.check_attention(Backend.XLA, SETTINGS, record)
    assert list(record.results) == [spec.name for spec in specs]
    assert set(both) == {Backend.XLA}
    record = Record()
    found = record.results
    both.clear()
    mosaic.run(SETTINGS, record)
    assert list(found) == [SWIZZLED.name, ragged.name, "cases of mosaic-gpu"]
    assert all(result["ok"] for result in found.values()), found
    assert found["cases of mosaic-gpu"]["error"] == "3 of 5 cases are not for it"
    assert both == [Backend.MOSAIC_GPU] * 2


def test_a_part_for_the_second_backend_says_where_there_is_none():
    record = Record()
    mosaic.run(SETTINGS, record)
    assert record.results == {
        "mosaic-gpu": {"ok": True, "error": "xla brings no other backend with it"}
    }


def test_every_option_size_and_job_has_a_case_for_the_second_backend():
    taken = [spec for spec in list_specs("full") if correctness._takes(Backend.MOSAIC_GPU, spec)]
    for job in ("decode", "ragged"):
        mine = [spec for spec in taken if spec.job == job]
        assert {spec.heads for spec in mine} == {(32, 8, 128), (9, 3, 64), (14, 2, 64), (16, 1, 64)}
        assert {spec.block_size for spec in mine} == {8, 16, 32, 64, 128}
        assert "many" in {spec.rows for spec in mine}
        assert {spec.dtype for spec in mine} == {"bfloat16", "float16"}
        assert all(options in [spec.options for spec in mine] for options in OPTIONS)


def test_many_rows_give_every_program_of_an_h100_several_splits():
    many = [spec for spec in list_specs("full") if spec.rows == "many" and spec.job == "decode"]
    for spec in many:
        _, K, H = spec.heads
        split_tokens = 512 if H > 64 else 256
        splits = sum(-(-context // split_tokens) for _, context in MANY_ROWS)
        assert splits * K >= 4 * 132, spec
    assert {spec.heads[2] for spec in many} == {64, 128}


@pytest.mark.parametrize("is_right", [True, False])
def test_bits_that_follow_the_number_of_programs_are_found(
    monkeypatch: pytest.MonkeyPatch, is_right: bool
):
    spec = dataclasses.replace(SWIZZLED, options={}, rows="many")
    attend = functools.partial(correctness.paged_decode, backend=Backend.XLA)
    asked = []

    def in_programs(head_size: int, count: int, backend: Backend) -> Any:
        asked.append((head_size, count, backend))
        factor = 1.0 if is_right or count == 132 else 1.01
        return lambda *arrays, **options: factor * attend(*arrays, **options)

    monkeypatch.setattr(
        correctness,
        "paged_decode",
        lambda *arrays, **rest: attend(*arrays, **rest | {"backend": Backend.XLA}),
    )
    monkeypatch.setattr(correctness, "mosaic_decode", in_programs)
    record = Record()
    case = make_case(spec, SETTINGS)
    correctness.check_cases([(spec, case)], Backend.MOSAIC_GPU, SETTINGS, record)
    assert asked == [(64, 5, Backend.MOSAIC_GPU), (64, 132, Backend.MOSAIC_GPU)]
    found = record.results[spec.name]
    assert found["ok"] == is_right, found
    assert is_right or found["error"] == "other bits of 5 programs"


@pytest.mark.parametrize("how", ["wrong", "raises", "does not compile"])
def test_a_case_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, how: str):
    right, check = correctness.paged_decode, correctness._check
    other = dataclasses.replace(SWIZZLED, job="ragged")

    def attend(*arrays: Any, **options: Any) -> jax.Array:
        if how == "does not compile":
            raise ValueError("planted")
        return (1.05 if how == "wrong" else 1.0) * right(*arrays, **options)

    def check_or_raise(one: Any, *rest: Any) -> dict:
        if how == "raises" and one.spec is SWIZZLED:
            raise RuntimeError("planted")
        return check(one, *rest)

    monkeypatch.setattr(correctness, "list_specs", lambda scale: [SWIZZLED, other])
    monkeypatch.setattr(large, "cases", lambda *_: [])
    monkeypatch.setattr(correctness, "paged_decode", attend)
    monkeypatch.setattr(correctness, "_check", check_or_raise)
    record = Record()
    correctness.check_attention(Backend.XLA, SETTINGS, record)
    wrong = [name for name, result in record.results.items() if not result["ok"]]
    assert wrong == [SWIZZLED.name]
    assert list(record.results) == [SWIZZLED.name, other.name]


def test_a_store_into_a_padding_token_is_found(monkeypatch: pytest.MonkeyPatch):
    spec = dataclasses.replace(SWIZZLED, job="ragged", options={})
    right = correctness.paged_attention
    spoilt = -1  # of the tokens, where there is one

    def attend(*arrays: Any, backend: Backend, **options: Any) -> jax.Array:
        assert backend is Backend.PALLAS_GPU
        out = right(*arrays, backend=Backend.PALLAS_GPU_INTERPRET, **options)
        return out if spoilt is None else out.at[spoilt].add(1)

    monkeypatch.setattr(correctness, "paged_attention", attend)
    case = make_case(spec, SETTINGS)
    record = Record()
    correctness.check_cases([(spec, case)], Backend.PALLAS_GPU, SETTINGS, record)
    assert record.results[spec.name]["error"] == "padding tokens were written to"
    spoilt = None
    correctness.check_cases([(spec, case)], Backend.PALLAS_GPU, SETTINGS, record)
    assert record.results[spec.name]["ok"], record.results


def test_an_id_behind_a_context_is_none_of_the_pool():
    ragged = make_case(SWIZZLED, SETTINGS)
    S, lens = SWIZZLED.block_size, ragged.seq_lens[:, None]
    behind = np.arange(ragged.block_tables.shape[1])[None, :] * S >= lens
    assert (ragged.block_tables[behind] == NO_BLOCK).all()
    assert (ragged.block_tables[~behind] < len(ragged.pool)).all()


@pytest.mark.parametrize(
    "module",
    [pytest.param(decode, marks=pytest.mark.kernels), prefill],
    ids=lambda module: module.__name__,
)
def test_the_second_backend_is_a_side_that_comes_last_and_may_not_fail(
    monkeypatch: pytest.MonkeyPatch, both: list[Backend], module: Any
):
    paged, measure = module.paged, module.measure
    record = Record()
    found = record.results
    module.run(SETTINGS, record)
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
    record = Record()
    again = record.results
    module.run(SETTINGS, record)
    assert [(name, result["ok"]) for name, result in again.items()] == [(mine, False)]


def test_parity_names_the_dtype_that_the_kernels_do_not_take():
    workload = parity.WORKLOADS["full"]
    record = Record()
    found = record.results
    taken = parity._dtypes(workload, Backend.MOSAIC_GPU, record)
    assert list(taken) == [("bfloat16", None)]
    assert list(found) == ["float32 tokens"]
    assert found["float32 tokens"]["ok"]
    assert "got float32" in found["float32 tokens"]["error"]
    found.clear()
    taken = parity._dtypes(workload, Backend.XLA, record)
    assert list(taken) == list(parity.DTYPES)
    assert not found


def test_parity_that_compared_nothing_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parity, "DTYPES", (("float32", "highest"),))
    record = Record()
    parity.check_tokens(Backend.MOSAIC_GPU, SETTINGS, record)
    assert [result["ok"] for result in record.results.values()] == [True, False]
    assert record.results["any tokens"]["error"] == "mosaic-gpu takes no dtype of these"


def test_parity_of_a_model_that_repeats_itself_shows_too_little():
    answers: list = [[[1, 2, 1, 2]] * 2] * 2
    found = parity._compare([[5]], answers, cast("LLM", None), "float32")
    assert not found["ok"]
    assert found["error"] == "2 distinct tokens show too little, 10 are needed"


def test_a_token_in_bfloat16_that_is_no_near_tie_is_found(monkeypatch: pytest.MonkeyPatch):
    right, sides = parity._answers, []

    def answers(llm: Any, *rest: Any) -> list[list[int]]:
        sides.append(llm)
        found = right(llm, *rest)
        if len(sides) == 2:
            found[1][7] ^= 1
        return found

    monkeypatch.setattr(parity, "DTYPES", (("bfloat16", None),))
    monkeypatch.setattr(parity, "_answers", answers)
    record = Record()
    parity.check_tokens(Backend.XLA, SETTINGS, record)
    found = record.results["bfloat16 tokens"]
    assert not found["ok"]
    assert found["differences"] == 1
    assert found["farthest"] > parity.NEAR_TIES["bfloat16"]
    assert "less likely than the likeliest, at most 0.25 are" in found["error"]
    assert record.results["bfloat16 events"]["ok"]


def test_a_step_is_timed_with_the_second_backend_last(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step, "second_backend", lambda *_: Backend.REFERENCE)
    record = Record()
    step.run(SETTINGS, record)
    assert list(record.results) == ["tiny 3 x 40 xla", "tiny 3 x 40 reference"]
    again = Record()
    step.run(dataclasses.replace(SETTINGS, known=("tiny 3 x 40 xla",)), again)
    assert list(again.results) == ["tiny 3 x 40 reference"]


@pytest.mark.parametrize("module", [correctness, decode, prefill], ids=lambda m: m.__name__)
def test_what_is_known_is_not_found_again(monkeypatch: pytest.MonkeyPatch, module: Any):
    if module is correctness:
        names = [spec.name for spec in list_specs("toy")]
        monkeypatch.setattr(large, "cases", lambda *_: [])
        monkeypatch.setattr(changes, "check", lambda *_: None)
    else:
        (shape,) = module.SHAPES["toy"]
        other = "contiguous" if module is decode else "cudnn"
        names = [f"{shape.name} xla", f"{shape.name} {other}"]
    record = Record()
    module.run(dataclasses.replace(SETTINGS, known=(names[0],)), record)
    assert list(record.results) == names[1:]


def test_requests_through_the_whole_engine_all_decode_together_in_the_end():
    record = Record()
    serving.run(SETTINGS, record)
    (found,) = record.results.values()
    assert found["ok"]
    assert found["decode_tokens_per_s"] > found["tokens_per_s"] > 0
    assert found["seconds"] > found["first_token_s"] > 0


def test_rates_are_of_the_time_in_which_every_request_decodes():
    # The second begins at 2 s and the first ends at 6 s: 2, 2 and 3 s of steps lie between.
    arrivals = [[0.5, 2.0, 4.0, 6.0], [2.0, 5.0, 9.0, 9.5]]
    found = serving.rates(arrivals, seconds=10.0)
    assert found["step_ms"] == 2000
    assert found["decode_tokens_per_s"] == 1.0
    assert found["tokens_per_s"] == 0.8
    assert found["first_token_s"] == 2.0
    apart = serving.rates([[0.5, 1.0], [2.0, 5.0]], seconds=5.0)
    assert apart["tokens_per_s"] == 0.8
    assert "step_ms" not in apart


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


def test_ragged_rows_own_every_block_once_and_nothing_else_is_finite():
    ragged = make_ragged([(1, 9), (3, 20)], heads=(2, 1, 4), block_size=4, dtype="float16", seed=0)
    used = ragged.block_tables[ragged.block_tables < NO_BLOCK]
    assert len(set(used.tolist())) == len(used) == 8
    assert np.isfinite(ragged.pool.astype(np.float32)).sum() == (9 + 20) * 8
