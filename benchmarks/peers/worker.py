"""What runs in each side's own process: load, warm up, then one set of requests at a time.

Lines of JSON: the job comes on the first, the name of a set on each that follows; a line goes back
for each. Standard library only: a peer's interpreter has no JAX.
"""

import contextlib
import json
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol, TypedDict

from benchmarks.others import OthersShare
from benchmarks.process_memory import memory_bytes

Request = tuple[list[int], int]  # a prompt's token ids, and how many tokens must follow
WARM_UP: list[Request] = [([7] * 300, 8), ([9] * 40, 8), ([11] * 20, 8)]


class Job(TypedDict):
    """What every side is told."""

    model: str
    dtype: str
    max_num_seqs: int
    max_model_len: int
    program: str | None  # of a side that is one
    sets: dict[str, list[list[Request]]]  # waves: the requests of one come at once, when the last
    # answer of the one before has ended


class Side(Protocol):
    """An engine, loaded."""

    version: str

    @property
    def process_ids(self) -> Sequence[int]:
        """Numbers of its processes beside this one."""
        ...

    def reset(self) -> None:
        """Forgets what earlier requests left in a cache."""
        ...

    def run(self, wave: Sequence[Request]) -> list[list[int]]:
        """The answers' token ids, in the requests' order, greedy and of exactly that length."""
        ...


class MissingPeerError(Exception):
    """Why this side cannot be had here."""


def serve(load: Callable[[Job], Side]) -> None:
    """Answers on what was standard output; what libraries print there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job: Job = json.loads(sys.stdin.readline())
    try:
        start = time.perf_counter()
        side = load(job)
        loaded = time.perf_counter()
        side.run(WARM_UP)
        warm_up = time.perf_counter() - loaded
    except (ImportError, MissingPeerError) as error:
        answers.write(json.dumps({"missing": str(error)}) + "\n")
        return
    except Exception:  # noqa: BLE001  whatever a library raises: it is told, and the others go on
        answers.write(json.dumps({"error": traceback.format_exc()}) + "\n")
        return
    ready = {"version": side.version, "load_s": loaded - start, "warm_up_s": warm_up}
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(_timed(side, job["sets"][json.loads(line)])) + "\n")


def _timed(side: Side, waves: list[list[Request]]) -> dict:
    side.reset()
    processes = [os.getpid(), *side.process_ids]
    for process_id in processes:
        _forget_peak(process_id)
    others, start = OthersShare(side.process_ids), time.perf_counter()
    token_ids = [answer for wave in waves for answer in side.run(wave)]
    seconds = time.perf_counter() - start
    share = others.now()
    wanted = [count for wave in waves for _, count in wave]
    if (got := [len(answer) for answer in token_ids]) != wanted:
        return {"error": f"expected answers of {wanted} tokens, got {got}"}
    return {
        "seconds": seconds,
        "others_share": share,
        "token_ids": token_ids,
        "peak_rss_bytes": sum(memory_bytes("VmHWM", process) or 0 for process in processes),
    }


def _forget_peak(process_id: int) -> None:
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak since its start
        pathlib.Path(f"/proc/{process_id}/clear_refs").write_text("5")
