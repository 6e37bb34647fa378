"""Types of command line arguments, so that a bad one is refused before anything is loaded."""

import argparse
import pathlib


def at_least_one(text: str) -> int:
    """A number of things, at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return number


def existing_file(text: str) -> str:
    """The path of a file that is there."""
    if not pathlib.Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return text
