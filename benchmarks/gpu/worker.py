"""Runs one part in a process of its own: `python -m benchmarks.gpu.worker PART FILE`.

It imports what parts need, then waits for its settings on the standard input, so that the next
part's process can start while another part has the device. A part that hangs can be killed, and
one that breaks the device's context takes no other with it. The file is written anew before and
after every result.
"""

import importlib
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax

from benchmarks.gpu.reports import write_whole
from benchmarks.gpu.settings import Record, Settings, describe
from benchmarks.measure import host_provenance
from jpaged.compilation import enable_cache


def main() -> None:
    """Runs the part that the command names."""
    part, path = sys.argv[1], pathlib.Path(sys.argv[2])
    module = importlib.import_module(f"benchmarks.gpu.{part}")
    given = sys.stdin.readline()
    if not given:  # the command has ended before this part's turn
        return
    settings = Settings(**json.loads(given))
    enable_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    start = time.perf_counter()
    told = {key: value for key, value in vars(settings).items() if key not in ("known", "origin")}
    report: dict = {"part": part, "origin": settings.origin, "settings": told}

    def write() -> None:
        report["seconds"] = round(time.perf_counter() - start, 1)
        report["running"] = record.running
        report["results"] = {
            name: {key: _plain(value) for key, value in result.items()}
            for name, result in record.results.items()
        }
        write_whole(path, json.dumps(report))

    def tell() -> None:
        write()
        if record.running is None:
            name, result = list(record.results.items())[-1]
            line = f"{report['seconds']:6.1f} s  {part}: {name}: {result}"
            print(line, file=sys.stderr, flush=True)

    record = Record(tell)
    try:
        device = jax.devices()[0]
        report["device"] = device.device_kind
        report["platform"] = device.platform
        report["versions"] = host_provenance()["versions"]
        module.run(settings, record)
        record.running = None
        report["status"] = "done"
    except Exception as error:
        report["status"], report["error"] = "failed", describe(error)
        raise
    finally:
        write()


def _plain(value: Any) -> Any:
    """The value, or its name where JSON has no such number."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
