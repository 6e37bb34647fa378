"""A side's process as `benchmarks.compare` sees it: started, asked, ended."""

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
from typing import Any

from benchmarks.peers import module_of
from benchmarks.peers.worker import Job

ROOT = pathlib.Path(__file__).parents[2]
NUM_PRELOADED = 2
TCMALLOC = "libtcmalloc_minimal.so.4"  # vLLM on a CPU wants it, and its own OpenMP, loaded first

CLOSE_S = 10
ANSWER_S = 1800  # no set takes so long; a side that hangs is not waited for


class SideError(Exception):
    """A side that is not here, or has failed; the text says which."""


class SideProcess:
    """One side, loaded and warm once made. Raises SideError."""

    def __init__(self, side: str, python: str, job: Job) -> None:
        if not job["model"] and side != "jpaged":
            raise SideError("it needs --model, or its own --peer-model")
        try:
            self._process = subprocess.Popen(
                [python, "-m", module_of(side)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment(side, python),
                start_new_session=True,  # what it starts ends with it
            )
        except OSError as error:
            raise SideError(f"{python}: {error.strerror}") from error
        self.ready = self._exchange(job)

    def run(self, name: str) -> dict[str, Any]:
        """What the side says of one set of requests. Raises SideError."""
        return self._exchange(name)

    def _exchange(self, message: object) -> dict[str, Any]:
        assert self._process.stdin is not None, "it was started with pipes"
        assert self._process.stdout is not None, "it was started with pipes"
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], ANSWER_S)[0]:
                self.close()
                raise SideError(f"no answer within {ANSWER_S} s")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideError(f"ended with status {self.close()}; see its messages above")
        answer = json.loads(line)
        for word in ("missing", "error"):
            if word in answer:
                self.close()
                raise SideError(answer[word])
        return answer

    def close(self) -> int | None:
        """Ends the process, which has no more to read; its status. May be called again."""
        if self._process.returncode is not None:
            return self._process.returncode
        try:
            self._process.communicate(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        with contextlib.suppress(ProcessLookupError):  # the group is empty: all have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        return self._process.returncode


def environment(side: str, python: str) -> dict[str, str]:
    """What a side's process is to find; ours in a tree that is not installed, as well."""
    found = dict(os.environ)
    if side == "jpaged":
        paths = [str(ROOT), str(ROOT / "models"), found.get("PYTHONPATH", "")]
        return {**found, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    found.pop("PYTHONPATH", None)
    if side == "vllm":
        libraries = [
            *pathlib.Path("/usr/lib").glob(f"*/{TCMALLOC}"),
            *pathlib.Path(python).parent.parent.glob("lib/libiomp5.so"),
        ]
        found["LD_PRELOAD"] = ":".join(map(str, libraries))
        if len(libraries) < NUM_PRELOADED:
            print(f"vllm runs without {TCMALLOC} or libiomp5.so: it is slower so", file=sys.stderr)
    return found
