"""Types of command line arguments, so that a bad one is refused before anything is loaded."""

import argparse
import math
import pathlib
import re

import jax

from jpaged.beams import BeamSearchParams
from jpaged.config import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE
from jpaged.params import SamplingParams
from pallas_kernels import Backend

BLOCK_SIZES = tuple(
    size for size in range(MIN_BLOCK_SIZE, MAX_BLOCK_SIZE + 1) if not size & (size - 1)
)

BACKENDS = ("auto", *(backend.value for backend in Backend))  # of attention


def cache_dtype(text: str) -> str:
    """A dtype in which both a paged and an unpaged cache are at their best on the device."""
    if text != "float32" and jax.devices()[0].platform == "cpu":
        raise argparse.ArgumentTypeError(
            f"expected float32 on a CPU, got {text}: XLA converts all of another cache to write a "
            "row, and the unpaged baseline would do little else"
        )
    return text


def at_least_one(text: str) -> int:
    """A number of things, at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return number


def at_least_zero(text: str) -> int:
    """A number of things, or none."""
    if text.strip() == "0":
        return 0
    try:
        return at_least_one(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}") from None


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return number


def beam_width(text: str) -> int:
    """As many beams as a search may have."""
    try:
        return BeamSearchParams(beam_width=at_least_one(text)).beam_width
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def repetition_penalty(text: str) -> float:
    """A penalty that a request may have."""
    try:
        return SamplingParams(repetition_penalty=float(text)).repetition_penalty
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def existing_file(text: str) -> str:
    """The path of a file that is there."""
    if not pathlib.Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return text


def file_to_write(text: str) -> str:
    """The path of a file in a folder that is there; the file need not be."""
    path = pathlib.Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return text


def parse_heads(text: str) -> tuple[int, ...]:
    """Query heads, KV heads and head size from N/K/H."""
    if not re.fullmatch(r"[1-9]\d*(/[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(
            f"expected N/K/H (query heads, KV heads, head size), got {text}"
        )
    N, K, H = map(int, text.split("/"))
    if N % K:
        raise argparse.ArgumentTypeError(
            f"query heads must be a multiple of KV heads, got {N} and {K} in {text}"
        )
    return N, K, H


def parse_decode(text: str) -> tuple[int, int]:
    """Rows and the tokens of each one's context from BxC."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected BxC (rows x context tokens), got {text!r}")
    rows, context = map(int, text.split("x"))
    return rows, context


def parse_chunk(text: str) -> tuple[int, int]:
    """Queries of a chunk, and the tokens before it, from Q@P."""
    if not re.fullmatch(r"[1-9]\d*@\d+", text):
        raise argparse.ArgumentTypeError(
            f"expected Q@P (a chunk's queries @ the position of its first), got {text!r}"
        )
    queries, position = map(int, text.split("@"))
    return queries, position
