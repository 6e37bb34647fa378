"""How much of the machine other processes use while something is timed. Standard library only."""

import os
import pathlib
import time
from collections.abc import Sequence

CPU_FIELDS = slice(11, 13)  # utime and stime of /proc/PID/stat, counted behind the name


class OthersShare:
    """How much of the machine other processes have used since this was made.

    A figure taken while it is above a few per cent is not to be trusted. This process and its
    ended children are no others, nor are those whose numbers are given.
    """

    def __init__(self, process_ids: Sequence[int] = ()) -> None:
        self._own = process_ids
        self._busy, self._start = self._others_cpu_seconds(), time.perf_counter()

    def now(self) -> float | None:
        """A share from 0 to 1, or None where the system does not say."""
        busy = self._others_cpu_seconds()
        if busy is None or self._busy is None:
            return None
        elapsed = time.perf_counter() - self._start
        return round(max(0.0, (busy - self._busy) / elapsed / (os.cpu_count() or 1)), 3)

    def _others_cpu_seconds(self) -> float | None:
        """Processor seconds that all others have used; Linux only."""
        stat = pathlib.Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _idle, _waiting, irq, softirq, steal = (
            int(field) for field in stat.read_text().split(maxsplit=9)[1:9]
        )
        ticks = user + nice + system + irq + softirq + steal
        ticks -= sum(_ticks(process_id) for process_id in self._own)
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _ticks(process_id: int) -> int:
    text = pathlib.Path(f"/proc/{process_id}/stat").read_text()
    return sum(int(field) for field in text.rpartition(")")[2].split()[CPU_FIELDS])
