"""The rows of the table: which kernel on which shape, and one row's figures.

A row is estimated at two contexts, so that their difference is what a tile costs; the shorter
compilation counts, as whatever else runs on the machine makes it longer. Of several sizes of tile
the fastest makes the row. A write's context is its new tokens, and its tiles are the groups of
slots that they are in.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.aot import NotCompiledError
from benchmarks.tpu.chips import CHIPS, Chip
from benchmarks.tpu.estimate import Estimate, estimate_for_tpu
from benchmarks.tpu.probe import KERNEL, Work
from benchmarks.tpu.writes import CHUNK

BLOCK_SIZE = 16
WIDE_TABLE = 8192  # columns, of 128 thousand tokens
DECODE_CONTEXTS = (1024, 4096, 32768)
PREFILL = {"queries": 512, "context": 4096}  # a chunk of a prompt, the last tokens of its context
HEADS = ((32, 8, 128), (9, 3, 64), (14, 2, 64))

Candidate = dict[str, Any]  # options of a probe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `candidates` are tried in turn."""

    probe: str
    target: str
    chip: str
    heads: tuple[int, int, int]
    context: int
    candidates: Sequence[Candidate]

    @property
    def name(self) -> str:
        """The row in words, which is its key in the results."""
        heads = "/".join(map(str, self.heads))
        return f"{self.chip} {heads} context {self.context} {self.probe}"


def _tiles(*tile_blocks: int) -> list[Candidate]:
    return [{"tile_blocks": blocks} for blocks in tile_blocks]


# Each probe's function, its candidates and the contexts it is asked at.
_RAGGED_DEFAULT = _tiles(128)  # its table of tuned sizes has no entry for these shapes
_QUERIES = {"queries": PREFILL["queries"]}
_WRITES = (64, 256, CHUNK)
_PROMPT = [{**_QUERIES, **candidate} for candidate in _tiles(32, 64)]
PROBES: dict[str, tuple[str, list[Candidate], Sequence[int]]] = {
    "decode": ("benchmarks.tpu.probes:decode", [{}], DECODE_CONTEXTS),
    "decode-block-64": ("benchmarks.tpu.probes:decode", [{"block_size": 64}], DECODE_CONTEXTS),
    "decode-wide-table": (
        "benchmarks.tpu.probes:decode",
        [{"table_blocks": WIDE_TABLE}],
        DECODE_CONTEXTS[1:],  # its own tile is that of long contexts, which 1024 tokens do not fill
    ),
    "decode-jax-paged": (
        "benchmarks.tpu.peers:paged_attention",
        _tiles(16, 32, 64, 128, 256),
        DECODE_CONTEXTS,
    ),
    "decode-jax-paged-block-128": (
        "benchmarks.tpu.peers:paged_attention",
        [{**candidate, "block_size": 128} for candidate in _tiles(8, 16)],
        DECODE_CONTEXTS,
    ),
    "decode-jax-ragged-default": (
        "benchmarks.tpu.peers:ragged_paged_attention",
        _RAGGED_DEFAULT,
        DECODE_CONTEXTS,
    ),
    "decode-jax-ragged": (
        "benchmarks.tpu.peers:ragged_paged_attention",
        [{**candidate, "query_tile": 8} for candidate in _tiles(32, 64)],
        DECODE_CONTEXTS,
    ),
    "prefill": ("benchmarks.tpu.probes:prefill", [_QUERIES], [PREFILL["context"]]),
    "prefill-jax-ragged-default": (
        "benchmarks.tpu.peers:ragged_paged_attention",
        [{**_QUERIES, **candidate} for candidate in _RAGGED_DEFAULT],
        [PREFILL["context"]],
    ),
    "prefill-jax-ragged": (
        "benchmarks.tpu.peers:ragged_paged_attention",
        _PROMPT,
        [PREFILL["context"]],
    ),
    "write": ("benchmarks.tpu.writes:write", [{}], _WRITES),
    "write-xla": ("benchmarks.tpu.writes:scatter", [{}], _WRITES),
}


def make_rows(
    *,
    probes: Sequence[str],
    chips: Sequence[str],
    heads: Sequence[tuple[int, int, int]],
    contexts: Sequence[int] | None,
) -> list[Row]:
    """Rows in the table's order; `contexts` of None takes each probe's own."""
    rows = []
    for chip, shape in itertools.product(chips, heads):
        for probe in probes:
            target, candidates, own = PROBES[probe]
            rows += [
                Row(
                    probe=probe,
                    target=target,
                    chip=chip,
                    heads=shape,
                    context=context,
                    candidates=candidates,
                )
                for context in own
                if contexts is None or context in contexts
            ]
    return rows


def estimate_row(row: Row, *, timeout: int) -> dict[str, Any]:
    """The fastest candidate's figures, or why there is none."""
    figures, reasons = [], []
    for candidate in row.candidates:
        try:
            figures.append(_figures(row, candidate, timeout))
        except NotCompiledError as error:
            reasons.append(error.reason)
    head = {"chip": row.chip, "heads": row.heads, "context": row.context, "probe": row.probe}
    if not figures:
        return {**head, "kind": "compiler estimate", "reason": reasons[0], "us": None}
    best = min(figures, key=lambda found: found["time_cycles"])
    not_tried = {"other_candidates": reasons} if reasons else {}
    return {**head, "kind": "compiler estimate", **best, **not_tried}


def _figures(row: Row, candidate: Candidate, timeout: int) -> dict[str, Any]:
    # The second context is twice as long, or half where that would take the estimator minutes; of
    # a write half as well, since a v5e's estimator aborts on some lists of more than 512 tokens.
    other = row.context * 2 if 1024 <= row.context <= 4096 else row.context // 2
    found = {}
    for context in (row.context, other):
        options = {"heads": row.heads, "context": context, **_fitting(candidate, row.context)}
        found[context] = estimate_for_tpu(
            row.target, chip=row.chip, options=options, timeout=timeout
        )
    works = {context: Work(*estimate.compiled.extra[0]) for context, estimate in found.items()}
    seconds = min(estimate.compiled.compile_seconds for estimate in found.values())
    cycles = {context: estimate.of_kernel(KERNEL)[0] for context, estimate in found.items()}
    tile_cycles = (cycles[other] - cycles[row.context]) / (
        works[other].tiles - works[row.context].tiles
    )
    if tile_cycles <= 0:  # it loses track of copies where it does not abort
        counts = " and ".join(f"{count} for {context}" for context, count in cycles.items())
        reason = f"the estimator's cycles do not grow with the tokens: {counts}"
        raise NotCompiledError(reason, reason)
    return {
        "options": candidate,
        "tile": found[row.context].compiled.extra[1],
        "tile_cycles": round(tile_cycles * works[row.context].turns),
        **_times(cycles[row.context], tile_cycles, works[row.context], CHIPS[row.chip]),
        **_code_figures(found[row.context]),
        "compile_seconds": seconds,
    }


def _fitting(candidate: Candidate, context: int) -> Candidate:
    """The candidate with a tile no longer than the context; both contexts have the same."""
    if "tile_blocks" not in candidate:
        return {**candidate, "fitting": context}
    longest = context // candidate.get("block_size", BLOCK_SIZE)
    return {**candidate, "tile_blocks": min(candidate["tile_blocks"], longest)}


def _times(cycles: int, tile_cycles: float, work: Work, chip: Chip) -> dict[str, Any]:
    """Of one sequence: cycles, and what the chip's roofs say to them."""
    other_turns = (work.turns - 1) * work.tiles * tile_cycles
    kernel_cycles = (cycles + other_turns) * work.runs / work.rows
    memory_cycles = work.kv_bytes / work.rows / chip.hbm_bytes
    time_cycles = max(kernel_cycles, memory_cycles)
    ideal_memory = work.ideal_bytes / work.rows / chip.hbm_bytes
    matrix_cycles = work.flops / work.rows / chip.flops
    turns = work.tiles / work.rows * work.runs
    steady_cycles = max(tile_cycles * work.turns, memory_cycles / turns)
    return {
        "kernel_cycles": round(kernel_cycles),
        "memory_cycles": round(memory_cycles),
        "time_cycles": round(time_cycles),
        "us": round(time_cycles / chip.ghz / 1000, 2),
        "kv_bytes": work.kv_bytes // work.rows,
        "kv_of_ideal": round(work.kv_bytes / work.ideal_bytes, 3),
        "bytes_per_cycle": round(work.kv_bytes / work.rows / time_cycles),
        "peak_bytes_per_cycle": chip.hbm_bytes,
        "roof": round(max(ideal_memory, matrix_cycles) / time_cycles, 3),
        "steady_roof": round(max(ideal_memory, matrix_cycles) / turns / steady_cycles, 3),
        "matrix_roof": round(matrix_cycles / time_cycles, 3),
    }


def _code_figures(estimate: Estimate) -> dict[str, Any]:
    _, kernel = estimate.of_kernel(KERNEL)
    return {
        "bundles": kernel.whole.bundles,
        "turn_bundles": kernel.turn.bundles,
        "spills": kernel.whole.spills,
        "fills": kernel.whole.fills,
        "matmul_use": round(kernel.turn.use("MATMUL"), 3),
        "matpush_use": round(kernel.turn.use("MATPUSH"), 3),
        "valu_use": round(kernel.turn.use("VALU"), 3),
        "salu_use": round(kernel.turn.use("SALU"), 3),
    }
