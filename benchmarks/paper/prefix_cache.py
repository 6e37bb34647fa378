"""Two engines of the same bytes, one with the prefix cache and one without."""

import argparse

from benchmarks.serving_sides import make_engine
from jpaged import LLM

CACHE, NO_CACHE = "prefix cache", "no prefix cache"


def cache_engines(options: argparse.Namespace) -> dict[str, LLM]:
    """Both, by the names of their sides."""
    return {
        name: make_engine(
            options, block_size=options.block_size, enable_prefix_caching=name == CACHE
        )
        for name in (CACHE, NO_CACHE)
    }
