"""Runs one part in a process of its own: `python -m benchmarks.gpu.worker PART FILE`.

It imports what parts need, then waits for its settings on the standard input, so that the next
part's process can start while another part has the device. A part that hangs can be killed, and
one that breaks the device's context takes no other with it. The file is written anew after every
result.
"""

import dataclasses
import importlib
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax

from benchmarks.gpu.settings import Settings, describe
from benchmarks.measure import host_provenance
from jpaged.compilation import enable_cache


def main() -> None:
    """Runs the part that the command names."""
    part, path = sys.argv[1], pathlib.Path(sys.argv[2])
    module = importlib.import_module(f"benchmarks.gpu.{part}")
    settings = Settings(**json.loads(sys.stdin.readline()))
    enable_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    start = time.perf_counter()
    report: dict = {"part": part, "settings": dataclasses.asdict(settings), "results": {}}

    def record(name: str, result: dict) -> None:
        report["results"][name] = {key: _plain(value) for key, value in result.items()}
        report["seconds"] = round(time.perf_counter() - start, 1)
        write(path, report)
        print(f"{report['seconds']:6.1f} s  {part}: {name}: {result}", file=sys.stderr, flush=True)

    try:
        device = jax.devices()[0]
        report["device"] = device.device_kind
        report["platform"] = device.platform
        report["versions"] = host_provenance()["versions"]
        module.run(settings, record)
        report["status"] = "done"
    except Exception as error:
        report["status"], report["error"] = "failed", describe(error)
        raise
    finally:
        report["seconds"] = round(time.perf_counter() - start, 1)
        write(path, report)


def _plain(value: Any) -> Any:
    """The value, or its name where JSON has no such number."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(path: pathlib.Path, report: dict) -> None:
    """The report in the file, whole at any moment."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(report))
    draft.replace(path)


if __name__ == "__main__":
    main()
