"""Other configurations of the kernels, timed at the shapes of the parts decode and prefill.

A file is JSON: `{"32/8/128": [{...}, ...], ...}`, the fields of configurations by the heads they
are for, or a list of them, for all heads or for those in a field `heads`. What is for a kernel of
`mosaic-gpu` says so: `"kernel": "mosaic decode"` or `"mosaic prefill"`; `mosaic_candidates.json`
beside this file has some. The default comes first.
What `benchmarks.tune_gpu` has written is read as well: of it, what is for this GPU and these parts.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.gpu import decode, prefill
from benchmarks.gpu.chips import GPUS
from benchmarks.gpu.settings import Record, Settings
from pallas_kernels.gpu.decode import paged_decode
from pallas_kernels.gpu.mosaic.limits import missing_jax
from pallas_kernels.gpu.ragged import RaggedConfig, paged_prefill
from pallas_kernels.gpu.tiles import DecodeConfig

MOSAIC = "mosaic"  # how the names of the kernels of `mosaic-gpu` begin
SHOWN = 3  # of the best configurations of a shape
BLOCK_SIZE = 16  # of the shapes of both parts
SURVIVORS, COMPILED = "survivors", "compiled"  # in the tuner's files: cuts, and a cut's figures


class Kernel(NamedTuple):
    """A kernel, its configurations, and where and how they are timed."""

    name: str
    config_class: type
    shapes: Sequence[Any]
    time_all: Callable[..., dict[str, dict]]

    def takes(self, candidate: Mapping[str, Any]) -> bool:
        """Whether the candidate is for this kernel: by name, or by its fields where it has none."""
        fields = {field.name for field in dataclasses.fields(self.config_class)}
        by_fields = set(candidate) - {"heads"} <= fields and not self.name.startswith(MOSAIC)
        return candidate.get("kernel") == self.name or by_fields


def run(settings: Settings, record: Record) -> None:
    """Records the best configuration of each shape, and all others beside it."""
    if not settings.candidates:
        raise ValueError("the part candidates needs a file: --candidates FILE")
    contents = [json.loads(pathlib.Path(path).read_text()) for path in settings.candidates]
    found = [candidate for content in contents for candidate in read(content, chip=chip_here())]
    for kernel in _kernels(settings):
        mine = [one for one in found if kernel.takes(one)]
        found = [one for one in found if one not in mine]
        for shape in kernel.shapes if mine else []:
            name = f"{kernel.name} {shape.name}"
            if not settings.lacks(name):
                continue
            record.begin(name)
            configs = _configs(kernel.config_class, mine, shape.heads)
            results = kernel.time_all(shape, configs, dataclasses.replace(settings, known=()))
            _record_best(name, results, record)
    if found:
        raise ValueError(f"candidates that are for no kernel here: {found[:3]}")


def _kernels(settings: Settings) -> list[Kernel]:
    """All that this JAX has."""
    decodes, prefills = decode.shapes_for(settings), prefill.shapes_for(settings)
    kernels = [
        Kernel("decode", DecodeConfig, decodes, time_decode),
        Kernel("prefill", RaggedConfig, prefills, time_prefill),
    ]
    if missing_jax(interpreted=_is_interpreted(settings)) is None:
        from pallas_kernels.gpu.mosaic import decode as on_hopper
        from pallas_kernels.gpu.mosaic import prefill as prompts_on_hopper

        timed = functools.partial(time_decode, kernel=on_hopper.paged_decode)
        kernels.append(Kernel(f"{MOSAIC} decode", on_hopper.MosaicDecodeConfig, decodes, timed))
        timed = functools.partial(time_prefill, kernel=prompts_on_hopper.paged_prefill)
        kernels.append(
            Kernel(f"{MOSAIC} prefill", prompts_on_hopper.MosaicPrefillConfig, prefills, timed)
        )
    return kernels


def read(
    content: Any, *, chip: str | None = None, heads: tuple[int, ...] | None = None
) -> Iterator[dict]:
    """Each candidate's fields; `heads` among them where it is for these alone."""
    if isinstance(content, list):
        for one in content:
            own = tuple(one["heads"]) if "heads" in one else heads
            fields = {key: value for key, value in one.items() if key not in ("heads", COMPILED)}
            yield fields | ({} if own is None else {"heads": own})
        return
    for key, value in content.items():
        if " " not in key:
            yield from read(value, heads=tuple(map(int, key.split("/"))))
            continue
        _, its_chip, its_heads, dtype, block_size = key.split(" ")
        if (its_chip, dtype, block_size) == (chip, decode.DTYPE, str(BLOCK_SIZE)):
            yield from read(value[SURVIVORS], heads=tuple(map(int, its_heads.split("/"))))


def chip_here() -> str | None:
    """What is compiled for to run on the first device, by the compiler's name."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return next((name for name, gpu in GPUS.items() if gpu.capability == capability), None)


def _configs(config_class: Any, found: list[dict], heads: tuple[int, ...]) -> dict[str, Any]:
    """The default and the candidates for these heads, by their fields."""
    configs: dict[str, Any] = {"default": None}
    for one in found:
        if one.get("heads", heads) == heads:
            fields = {key: value for key, value in one.items() if key not in ("heads", "kernel")}
            configs[cut_name(fields)] = config_class(**fields)
    return configs


def cut_name(fields: Mapping[str, int]) -> str:
    """A configuration in words, by its fields."""
    return " ".join(f"{name}={value}" for name, value in fields.items())


def time_decode(
    shape: decode.DecodeShape,
    configs: Mapping[str, Any],
    settings: Settings,
    *,
    kernel: Callable[..., Any] = paged_decode,
) -> dict[str, dict]:
    """What each configuration takes; the default where it is None."""
    kernel = functools.partial(kernel, interpret=_is_interpreted(settings))

    def attend(q: Any, pool: Any, tables: Any, lens: Any, *, config: Any) -> Any:
        return kernel(q, pool, tables, lens, scale=shape.scale, config=config)

    sides = {
        name: decode.Side(functools.partial(attend, config=config), is_peer=True)
        for name, config in configs.items()
    }
    record = Record()
    decode.measure({shape: sides}, settings, record)
    return _named(record.results, shape.name)


def time_prefill(
    shape: prefill.PrefillShape,
    configs: Mapping[str, Any],
    settings: Settings,
    *,
    kernel: Callable[..., Any] = paged_prefill,
) -> dict[str, dict]:
    """The same for a prompt."""
    kernel = functools.partial(kernel, interpret=_is_interpreted(settings))

    def attend(q: Any, pool: Any, batch: Any, *, config: Any) -> jax.Array:
        decoded = jnp.zeros((batch.seq_lens.shape[0], *q.shape[1:]), q.dtype)
        return kernel(q, pool, batch, decoded, scale=shape.scale, config=config)

    sides = {name: functools.partial(attend, config=config) for name, config in configs.items()}
    record = Record()
    prefill.measure({shape: sides}, settings, record)
    return _named(record.results, shape.name)


def are_right(results: Mapping[str, dict]) -> dict[str, dict]:
    """Those that have a time and compute the right thing."""
    return {key: one for key, one in results.items() if "us" in one and "error" not in one}


def _is_interpreted(settings: Settings) -> bool:
    return settings.backend.endswith("interpret")


def _named(results: dict[str, dict], shape_name: str) -> dict[str, dict]:
    return {key.removeprefix(shape_name).strip(): result for key, result in results.items()}


def _record_best(name: str, results: dict[str, dict], record: Record) -> None:
    """The best of a shape, which must be right, the default's time, and all, best first."""
    timed = are_right(results)
    ranked = sorted(timed, key=lambda key: timed[key]["us"])
    failed = {key: one.get("error", one) for key, one in results.items() if key not in timed}
    if not ranked:
        record(name, {"ok": False, "error": str(failed)[:300], "failed": failed})
        return
    best = timed[ranked[0]]
    default = timed.get("default", {}).get("us")
    runners_up = ", ".join(f"{key}: {timed[key]['us']}" for key in ranked[1:SHOWN])
    shown = f"{ranked[0]} (default {default} us; then {runners_up})"
    everything = {key: timed[key]["us"] for key in ranked}
    record(name, {**best, "config": shown, "all_us": everything, "failed": failed})
