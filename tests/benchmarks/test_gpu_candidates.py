"""Other configurations of the GPU kernels: which file goes to which kernel, and what is shipped."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from benchmarks.gpu import candidates
from benchmarks.gpu.candidates import read
from benchmarks.gpu.chips import GPUS
from benchmarks.gpu.settings import Record, Settings
from pallas_kernels.gpu.mosaic.limits import missing_jax

SETTINGS = Settings(backend="xla", scale="toy", seed=3, candidates=[], read_gbps=10.0)
ON_A_GPU = dataclasses.replace(SETTINGS, backend="pallas-gpu", scale="full")
CUTS = pathlib.Path(candidates.__file__).with_name("mosaic_candidates.json")


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
    record = Record()
    found = record.results
    if missing_jax(interpreted=False) is not None:
        with pytest.raises(ValueError, match=r"for no kernel here.*mosaic decode"):
            candidates.run(settings, record)
        return
    candidates.run(settings, record)
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
