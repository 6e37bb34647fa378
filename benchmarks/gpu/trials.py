"""Cuts on trial: compiled for a chip that need not be there, and timed on one that is."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from benchmarks.gpu import decode, prefill
from benchmarks.gpu.builds import ATTENTION, traced
from benchmarks.gpu.candidates import (
    COMPILED,
    SURVIVORS,
    are_right,
    cut_name,
    time_decode,
    time_prefill,
)
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.static_rows import kernel_figures
from benchmarks.gpu.topology import abstract_mesh, compile_each_for_gpu
from benchmarks.gpu.tuning import KEPT, Cut, Tried, fits, list_cuts, rank
from benchmarks.tables import Shape

TARGET = "benchmarks.gpu.builds:build_cut"


def formula(shape: Shape) -> Cut:
    """The cut of what no table has an entry for."""
    attention = ATTENTION[shape.kernel]
    _, arguments = attention.build(**_fields(shape))
    with jax.sharding.use_abstract_mesh(abstract_mesh(shape.chip)):
        return dataclasses.asdict(traced(attention.formula, *arguments[:2]))


def find_survivors(shape: Shape) -> dict[str, Any]:
    """At most KEPT cuts worth timing, each with its figures, and how many were left out and why."""
    ours = formula(shape)
    cuts = list_cuts(shape, ours)
    tried, left_out = _compile(shape, cuts)
    ranked = rank(shape, ours, tried)
    # What is kept compiles with every option as well, which takes more registers.
    whole: list[Tried] = []
    while ranked and len(whole) < KEPT:
        batch, ranked = ranked[:KEPT], ranked[KEPT:]
        again, _ = _compile(shape, [one.cut for one in batch], every_option=True)
        sound = [one.cut for one in again]
        whole += [one for one in batch if one.cut in sound]
    return {
        "formula": ours,
        "tried": len(cuts),
        **left_out,
        SURVIVORS: [one.cut | {COMPILED: _figures(one)} for one in whole[:KEPT]],
        "jax": jax.__version__,
    }


def time_cuts(shape: Shape, cuts: Sequence[Cut], *, seed: int) -> dict[str, dict[str, float]]:
    """Microseconds by cut and batch on this machine's GPU; what is wrong at one is left out."""
    settings = Settings(
        backend="pallas-gpu", scale="full", seed=seed, candidates=[], read_gbps=None
    )
    config_class = ATTENTION[shape.kernel].config_class
    configs = {cut_name(cut): config_class(**cut) for cut in cuts}
    times: dict[str, dict[str, float]] = {name: {} for name in configs}
    batches = decode.BATCHES if shape.kernel == "decode" else prefill.BATCHES
    for batch in batches:
        for name, found in are_right(_time(shape, batch, configs, settings)).items():
            times[name][" x ".join(map(str, batch))] = found["us"]
    return {name: found for name, found in times.items() if len(found) == len(batches)}


def _time(
    shape: Shape, batch: tuple[int, ...], configs: Mapping[str, Any], settings: Settings
) -> dict[str, dict]:
    fields = {"heads": shape.heads, "dtype": shape.dtype, "block_size": shape.block_size}
    if shape.kernel == "decode":
        rows, context = batch
        timed = decode.DecodeShape(rows=rows, context=context, **fields)
        return time_decode(timed, configs, settings)
    rows, queries, context = batch
    timed = prefill.PrefillShape(rows=rows, queries=queries, context=context, **fields)
    return time_prefill(timed, configs, settings)


def _compile(
    shape: Shape, cuts: Sequence[Cut], *, every_option: bool = False
) -> tuple[list[Tried], dict[str, int]]:
    """Those that fit, and how many do not."""
    more = {"kernel": shape.kernel, "every_option": every_option}
    options = [{**_fields(shape), **more, "config": cut} for cut in cuts]
    found = compile_each_for_gpu(TARGET, chip=shape.chip, options=options)
    tried, left_out = [], {"refused": 0, "spilled": 0, "too_large": 0}
    name = ATTENTION[shape.kernel].kernels[0]
    for cut, one in zip(cuts, found, strict=True):
        if isinstance(one, str):
            left_out["too_large" if "shared memory" in one.lower() else "refused"] += 1
            continue
        figures = kernel_figures(one.kernel(name), shape.chip)
        spilled, shared = figures["spilled_bytes"], figures["shared_bytes"]
        if fits(shape, spilled_bytes=spilled, shared_bytes=shared):
            rest = {key: figures[key] for key in ("registers", "shared_bytes", "resident")}
            tried.append(Tried(cut=cut, **rest))
        else:
            left_out["spilled" if spilled else "too_large"] += 1
    return tried, left_out


def _fields(shape: Shape) -> dict[str, Any]:
    return {"heads": shape.heads, "dtype": shape.dtype, "block_size": shape.block_size}


def _figures(tried: Tried) -> dict[str, int]:
    return {key: value for key, value in dataclasses.asdict(tried).items() if key != "cut"}
