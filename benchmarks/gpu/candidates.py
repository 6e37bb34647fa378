"""Other configurations of the kernels, timed at the shapes of the parts decode and prefill.

A file is JSON: `{"32/8/128": [{...}, ...], ...}`, the fields of configurations by the heads they
are for, or a list of them, for all heads or for those in a field `heads`. The default comes first.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import decode, prefill
from benchmarks.gpu.settings import Record, Settings
from pallas_kernels.gpu.decode import paged_decode
from pallas_kernels.gpu.ragged import RaggedConfig, paged_prefill
from pallas_kernels.gpu.tiles import DecodeConfig

SHOWN = 3  # of the best configurations of a shape


def run(settings: Settings, record: Record) -> None:
    """Records the best configuration of each shape, and all others beside it."""
    if not settings.candidates:
        raise ValueError("the part candidates needs a file: --candidates FILE")
    contents = [json.loads(pathlib.Path(path).read_text()) for path in settings.candidates]
    found = [candidate for content in contents for candidate in read(content)]
    for kernel, config_class, time_all in (
        (paged_decode, DecodeConfig, _time_decode),
        (paged_prefill, RaggedConfig, _time_prefill),
    ):
        fields = {field.name for field in dataclasses.fields(config_class)}
        mine = [one for one in found if set(one) - {"heads"} <= fields]
        found = [one for one in found if one not in mine]
        if mine:
            kernel = functools.partial(kernel, interpret=settings.backend.endswith("interpret"))
            time_all(kernel, config_class, mine, settings, record)
    if found:
        raise ValueError(f"candidates whose fields no kernel has: {found[:3]}")


def read(content: Any, heads: tuple[int, ...] | None = None) -> Iterator[dict]:
    """Each candidate's fields; `heads` among them where it is for these alone."""
    if isinstance(content, list):
        for one in content:
            own = tuple(one["heads"]) if "heads" in one else heads
            fields = {key: value for key, value in one.items() if key != "heads"}
            yield fields | ({} if own is None else {"heads": own})
        return
    for key, value in content.items():
        yield from read(value, tuple(map(int, key.split("/"))))


def _configs(config_class: Any, found: list[dict], heads: tuple[int, ...]) -> dict[str, Any]:
    """The default and the candidates for these heads, by their fields."""
    configs: dict[str, Any] = {"default": None}
    for one in found:
        if one.get("heads", heads) == heads:
            fields = {key: value for key, value in one.items() if key != "heads"}
            configs[" ".join(f"{k}={v}" for k, v in fields.items())] = config_class(**fields)
    return configs


def _time_decode(
    kernel: Callable[..., Any],
    config_class: Any,
    found: list[dict],
    settings: Settings,
    record: Record,
) -> None:
    def attend(q: Any, pool: Any, tables: Any, lens: Any, *, scale: float, config: Any) -> Any:
        return kernel(q, pool, tables, lens, scale=scale, config=config)

    for shape in decode.shapes_for(settings):
        sides = {
            name: decode.Side(
                functools.partial(attend, scale=shape.scale, config=config), is_peer=True
            )
            for name, config in _configs(config_class, found, shape.heads).items()
        }
        results: dict[str, dict] = {}
        decode.measure({shape: sides}, settings, results.__setitem__)
        _record_best(f"decode {shape.name}", shape.name, results, record)


def _time_prefill(
    kernel: Callable[..., Any],
    config_class: Any,
    found: list[dict],
    settings: Settings,
    record: Record,
) -> None:
    def attend(q: Any, pool: Any, batch: Any, *, scale: float, config: Any) -> jax.Array:
        decoded = jnp.zeros((batch.seq_lens.shape[0], *q.shape[1:]), q.dtype)
        return kernel(q, pool, batch, decoded, scale=scale, config=config)

    for shape in filter(lambda shape: settings.wants(shape.name), prefill.SHAPES[settings.scale]):
        sides = {
            name: functools.partial(attend, scale=shape.scale, config=config)
            for name, config in _configs(config_class, found, shape.heads).items()
        }
        results: dict[str, dict] = {}
        prefill.measure({shape: sides}, settings, results.__setitem__)
        _record_best(f"prefill {shape.name}", shape.name, results, record)


def _record_best(name: str, prefix: str, results: dict[str, dict], record: Record) -> None:
    """The best of a shape, which must be right, the default's time, and all, best first."""
    named = {key.removeprefix(prefix).strip(): result for key, result in results.items()}
    timed = {key: one for key, one in named.items() if "us" in one and "error" not in one}
    ranked = sorted(timed, key=lambda key: timed[key]["us"])
    failed = {key: one.get("error", one) for key, one in named.items() if key not in timed}
    if not ranked:
        record(name, {"ok": False, "error": str(failed)[:300], "failed": failed})
        return
    best = timed[ranked[0]]
    default = timed.get("default", {}).get("us")
    runners_up = ", ".join(f"{key}: {timed[key]['us']}" for key in ranked[1:SHOWN])
    shown = f"{ranked[0]} (default {default} us; then {runners_up})"
    everything = {key: timed[key]["us"] for key in ranked}
    record(name, {**best, "config": shown, "all_us": everything, "failed": failed})
