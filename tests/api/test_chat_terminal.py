"""`jpaged chat` as somebody at a terminal has it, where Ctrl-C is a signal to the whole program."""

import json
import os
import pathlib
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

CTRL_C, CTRL_D = "\x03", "\x04"
ASKS = "\n> "
PATIENCE_S = 120.0
# A session of its own does not yet make a terminal's keys signals: the program must take it. And
# tests that run in the background are started with Ctrl-C ignored.
COMMAND = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from jpaged.cli import main
sys.exit(main())
"""


class Terminal:
    """A `jpaged` command whose input and output are a terminal, and what it has said so far."""

    def __init__(self, *arguments: str) -> None:
        self._fd, its = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb"},
        )
        os.close(its)
        self._unread = ""

    def until(self, words: str) -> None:
        """Reads up to these words."""
        assert self._says(words, PATIENCE_S), f"waited for {words!r}; it said {self._unread!r}"
        self._unread = self._unread.partition(words)[2]

    def interrupt(self) -> None:
        """Ctrl-C until it asks again: input() misses a signal that comes just before it waits."""
        end = time.monotonic() + PATIENCE_S
        self.type(CTRL_C)
        while not self._says(ASKS, 2.0):
            assert time.monotonic() < end, f"it does not ask again; it said {self._unread!r}"
            self.type(CTRL_C)
        self.until(ASKS)

    def _says(self, words: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while words not in self._unread:
            ready, _, _ = select.select([self._fd], [], [], max(end - time.monotonic(), 0))
            if not ready:
                return False
            self._unread += os.read(self._fd, 4096).decode(errors="replace")
        return True

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


@pytest.fixture
def terminal(tiny_model_dir: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Terminal]:
    """Over a model whose answers take half a minute: a key always comes before their end."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "talkative")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**16}))
    options = ("--max-model-len=40000", "--max-tokens=30000", "--ignore-eos", "--seed=1")
    terminal = Terminal("chat", str(folder), *options)
    yield terminal
    terminal.close()


def test_ctrl_c_at_the_prompt_clears_the_line_and_two_in_an_answer_end_nothing(
    terminal: Terminal,
):
    terminal.until(ASKS)
    terminal.type("the sea\n")
    terminal.until("the sea\r\n")
    terminal.until(" ")
    terminal.type(CTRL_C)
    terminal.interrupt()
    terminal.interrupt()
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.interrupt()
    terminal.type("/exit\n")
    assert terminal.process.wait(PATIENCE_S) == 0


def test_ctrl_c_stops_the_answer_alone_and_ctrl_d_ends_the_conversation(terminal: Terminal):
    terminal.until("Ctrl-C stops an answer")
    terminal.until(ASKS)
    for question in ("the sea", "the sun"):
        terminal.type(question + "\n")
        terminal.until(question + "\r\n")  # the terminal's echo
        terminal.until(" ")  # an answer has begun
        terminal.interrupt()
        assert terminal.process.poll() is None
    terminal.type(CTRL_D)
    assert terminal.process.wait(PATIENCE_S) == 0
