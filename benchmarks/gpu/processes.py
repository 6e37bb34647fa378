"""A part's process as `benchmarks.gpu_check` sees it: started, told, waited for, ended."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from benchmarks.gpu.reports import take_draft

WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")
KILL_S = 10  # a process that a driver holds may outlive its own end
HUNG_S = 15  # no sound case takes so long


class PartProcess:
    """A part's process, started ahead: it imports and waits for its settings."""

    def __init__(self, part: str, draft: pathlib.Path, *, is_shared: bool) -> None:
        self.part, self.draft = part, draft
        self.began = time.monotonic()
        draft.parent.mkdir(parents=True, exist_ok=True)
        command = [*WORKER, part, str(draft)]
        # Processes that share a device must not each take most of its memory at once.
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if is_shared else {}
        environment = {**os.environ, **shared}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment)

    def go(self, settings: dict[str, Any]) -> None:
        """Lets the part begin."""
        assert self.process.stdin is not None, "it was started with a pipe"
        self.began = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it died; its status says so
            self.process.stdin.write(json.dumps(settings) + "\n")
            self.process.stdin.close()

    def result(self, limit: float, deadline: float) -> dict[str, Any]:
        """What the part has found after `limit` seconds at most, and not behind the deadline.

        Who takes longer than its own limit hangs; one whom the deadline ends is cut short.
        """
        end, timed_out = min(self.began + limit, deadline), False
        try:
            self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            timed_out = True
        code, seconds = self.kill(), time.monotonic() - self.began
        found = take_draft(self.draft) or {"results": {}}
        if timed_out and end == deadline:
            found["status"] = "cut short"
        elif timed_out:
            found["status"] = "failed"
            found["error"] = _note_hang(found, seconds, limit)
        elif code:
            found["status"] = "failed"
            found.setdefault("error", f"exit status {code}")
        return found

    def kill(self) -> int | None:
        """Ends the process, which may have ended; its status, or None where it does not end."""
        self.process.kill()
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            return self.process.wait(KILL_S)
        except subprocess.TimeoutExpired:
            print(f"{self.part}: process {self.process.pid} does not end", flush=True)
            return None


def _note_hang(found: dict[str, Any], seconds: float, limit: float) -> str:
    """What the part was at. It is a result as well, if it is what hung: the rest may go on."""
    name = found.get("running")
    if name is None:
        return f"hung between results: its {limit:.0f} s were over"
    at_it = seconds - found["seconds"]
    error = f"hung in {name}: at it for {at_it:.0f} s when the part's {limit:.0f} s were over"
    if at_it >= HUNG_S:
        found["results"][name] = {"ok": False, "error": error}
    return error
