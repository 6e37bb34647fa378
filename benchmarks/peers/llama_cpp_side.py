"""llama.cpp's server, which runs as a process of its own and is asked over HTTP."""

import http.client
import json
import os
import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Sequence

from benchmarks.peers.worker import Job, MissingPeerError, Request, serve

HOST = "127.0.0.1"
SLOTS = 16  # more of them answer the same requests no faster
START_S = 60.0
CACHE_TYPES = {"float32": "f32", "bfloat16": "bf16"}
GREEDY = {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"], "ignore_eos": True}


class LlamaCpp:
    """A server of 16 slots, started anew where its cached prompts are to be forgotten."""

    def __init__(self, job: Job) -> None:
        program = shutil.which(job["program"] or "llama-server")
        if program is None:
            raise MissingPeerError("no program llama-server")
        num_cores = str(len(os.sched_getaffinity(0)))
        # Options as the server spells them; 64 requests need as many threads to wait.
        self._command = [
            *(program, "-m", job["model"], "--host", HOST),
            *("-t", num_cores, "-tb", num_cores, "-np", str(SLOTS)),
            *("-c", str(job["max_model_len"] * SLOTS), "-fa", "on", "--no-warmup"),
            *("-ctk", CACHE_TYPES[job["dtype"]], "-ctv", CACHE_TYPES[job["dtype"]]),
            *("--threads-http", str(job["max_num_seqs"] + 8)),
        ]
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        self.version = (said.stderr + said.stdout).split("version:")[-1].split("\n")[0].strip()
        self._start()

    def _start(self) -> None:
        """A server at a port of its own: nobody else may answer. It ends with this group."""
        self._port = _free_port()
        self._server = subprocess.Popen(
            [*self._command, "--port", str(self._port)], stderr=subprocess.DEVNULL
        )
        self.process_ids = [self._server.pid]
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            if self._server.poll() is not None or time.monotonic() > deadline:
                self._server.kill()
                raise MissingPeerError(f"{self._command[0]} does not serve {self._command[2]}")
            time.sleep(0.1)

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._port)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()

    def reset(self) -> None:
        """A new server, which has met one other request."""
        self._server.kill()
        self._server.wait()
        self._start()
        self.run([([7] * 100, 4)])

    def run(self, wave: Sequence[Request]) -> list[list[int]]:
        """All answers; each request is posted at once, on a thread of its own."""
        answers: list[list[int]] = [[] for _ in wave]
        errors: queue.SimpleQueue[Exception] = queue.SimpleQueue()

        def ask(index: int, request: Request) -> None:
            try:
                answers[index] = _completion(self._port, *request)
            except Exception as error:  # noqa: BLE001  raised below, on the caller's thread
                errors.put(error)

        threads = [threading.Thread(target=ask, args=item) for item in enumerate(wave)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not errors.empty():
            raise errors.get()
        return answers


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        return bound.getsockname()[1]


def _completion(port: int, prompt: list[int], count: int) -> list[int]:
    body = {
        "prompt": prompt,
        "n_predict": count,
        "cache_prompt": True,
        "return_tokens": True,
        **GREEDY,
    }
    connection = http.client.HTTPConnection(HOST, port, timeout=600)
    connection.request(
        "POST", "/completion", json.dumps(body), {"Content-Type": "application/json"}
    )
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer["tokens"]


if __name__ == "__main__":
    serve(LlamaCpp)
