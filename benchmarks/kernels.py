"""Attention alone, by every backend of this machine, beside what the machine allows.

python -m benchmarks.kernels [--decode 1x1024 ...] [--prefill 256@1792 ...] [--heads 9/3/64]

Each backend that runs here, and plain jax.numpy over keys and values that lie in order, attend to
the same contexts in turns: BxC is a decode of B rows of C tokens, Q@P a chunk of Q queries behind P
tokens. A run is one program of --layers calls, each over a pool of its own, and figures are of one
call; where all pools together fit a cache, a call may take less than its roof. The roof is the
longer of two: bytes of live KV at the rate of reading a large array, operations at the rate of
a large product, both measured in the same turns. Shares are of the best run: a roof is what the
machine can do when it is left alone. Contiguous KV has the queries' dtype, also where the pool has
eight bits. On an accelerator a run has one launch from Python in it, which small shapes feel;
`benchmarks.gpu_check` times chains that outweigh it.
"""

import argparse
import json
import sys
from typing import Any

from benchmarks.arguments import (
    BLOCK_SIZES,
    at_least_one,
    at_least_zero,
    file_to_write,
    parse_chunk,
    parse_decode,
    parse_heads,
)
from benchmarks.attention_shapes import AttentionShape
from benchmarks.attention_sides import query_dtype, sides_of
from benchmarks.measure import CompileLog, Timing, interleaved, provenance
from benchmarks.plot import has_matplotlib
from benchmarks.plot_kernels import draw
from benchmarks.roof import READ_BYTES, multiply_large, read_large

DECODES = [(1, 1024), (8, 300), (32, 300), (8, 2000)]
CHUNKS = [(256, 0), (256, 1792)]
DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
READ, MULTIPLY = "read", "multiply"


def main() -> None:
    """Prints a table for people and, last, one JSON line."""
    options = _options()
    compiles = CompileLog()
    results, refused = [], {}
    print(
        f"{'shape':18} {'KV MB':>7} {'GFLOP':>7} {'roof ms':>8} {'of':>8}   "
        f"{'side':12} {'ms':>8} {'best':>8} {'share':>6} {'GB/s':>7} {'GFLOP/s':>8} "
        f"{'others':>7}"
    )
    for shape in _shapes(options):
        result, reasons = _measure(shape, options, compiles)
        results.append(result)
        refused |= reasons
        _print_rows(result)
    for name, reason in refused.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    report = {
        "benchmark": "kernels",
        "heads": list(options.heads),
        "dtype": options.dtype,
        "query_dtype": query_dtype(options.dtype),
        "block_size": options.block_size,
        "layers": options.layers,
        "repeats": options.repeats,
        "refused": refused,
        "results": results,
    }
    print(json.dumps({**report, **provenance()}), flush=True)
    if options.plot:
        draw(report, options.plot)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--decode", type=parse_decode, nargs="*", default=DECODES, metavar="BxC")
    add("--prefill", type=parse_chunk, nargs="*", default=CHUNKS, metavar="Q@P")
    add("--heads", type=parse_heads, default=(9, 3, 64), metavar="N/K/H")
    add("--dtype", choices=DTYPES, default="float32", help="of the pool")
    add("--block-size", type=int, choices=BLOCK_SIZES, default=16)
    add("--layers", type=at_least_one, default=8, help="calls of a run, a pool each")
    add("--repeats", type=at_least_one, default=15, help="runs behind each figure")
    add("--seed", type=at_least_zero, default=0)
    add("--plot", type=file_to_write, help="PNG to draw; needs matplotlib")
    options = parser.parse_args()
    if not options.decode and not options.prefill:
        parser.error("nothing to time: give --decode or --prefill a shape")
    if options.plot and not has_matplotlib():
        parser.error("--plot needs matplotlib; install jpaged[plot]")
    return options


def _shapes(options: argparse.Namespace) -> list[AttentionShape]:
    sizes = [(rows, 1, context) for rows, context in options.decode]
    sizes += [(1, queries, position + queries) for queries, position in options.prefill]
    return [
        AttentionShape(
            rows=rows,
            queries=queries,
            context=context,
            heads=options.heads,
            dtype=options.dtype,
            block_size=options.block_size,
        )
        for rows, queries, context in sizes
    ]


def _measure(
    shape: AttentionShape, options: argparse.Namespace, compiles: CompileLog
) -> tuple[dict, dict[str, str]]:
    """One shape's figures, and why backends are not among them."""
    sides = sides_of(shape, num_calls=options.layers, seed=options.seed)
    multiply, product_flops = multiply_large(query_dtype(shape.dtype))
    runs = {**sides.runs, READ: read_large(), MULTIPLY: multiply}
    for run in runs.values():
        run()
    compiles.events.clear()
    timings = interleaved(runs, repeats=options.repeats)
    assert not compiles.events, "a side compiled while it was timed"
    read_gbps = READ_BYTES / min(timings.pop(READ).seconds) / 1e9
    gflops = product_flops / min(timings.pop(MULTIPLY).seconds) / 1e9
    bounds = {"reads": shape.kv_bytes / read_gbps / 1e6, "products": shape.flops / gflops / 1e6}
    roof = max(bounds, key=bounds.__getitem__)
    result = {
        "shape": shape.name,
        "rows": shape.rows,
        "queries": shape.queries,
        "context": shape.context,
        "kv_bytes": shape.kv_bytes,
        "flops": shape.flops,
        "read_gbps": _rounded(read_gbps),
        "products_gflops": _rounded(gflops),
        "roof_ms": _rounded(bounds[roof]),
        "roof_of": roof,
        "sides": {
            name: _side(shape, timing, bounds[roof], options.layers)
            for name, timing in timings.items()
        },
    }
    for name, error in sides.errors.items():
        result["sides"][name]["error"] = _rounded(error)
    return result, sides.refused


def _side(shape: AttentionShape, timing: Timing, roof_ms: float, num_calls: int) -> dict[str, Any]:
    """Of one call."""
    best = min(timing.seconds) * 1e3 / num_calls
    return {
        "ms": _rounded(timing.median * 1e3 / num_calls),
        "min_ms": _rounded(best),
        "share": _rounded(roof_ms / best),
        "gbps": _rounded(shape.kv_bytes / best / 1e6),
        "gflops": _rounded(shape.flops / best / 1e6),
        "others_share": timing.others_share,
    }


def _rounded(figure: float) -> float:
    """To four digits that count: the figures of shapes lie orders of magnitude apart."""
    return float(f"{figure:.4g}")


def _print_rows(result: dict) -> None:
    """The shape once, then a line for each side."""
    head = (
        f"{result['shape']:18} {result['kv_bytes'] / 1e6:7.2f} {result['flops'] / 1e9:7.3f} "
        f"{result['roof_ms']:8.3f} {result['roof_of']:>8}   "
    )
    for name, side in result["sides"].items():
        share = side["others_share"]
        print(
            f"{head}{name:12} {side['ms']:8.3f} {side['min_ms']:8.3f} {side['share']:6.0%} "
            f"{side['gbps']:7.1f} {side['gflops']:8.1f} "
            + (7 * " " if share is None else f"{share:7.0%}"),
            flush=True,
        )
        head = " " * len(head)


if __name__ == "__main__":
    main()
