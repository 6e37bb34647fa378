"""What sharing and swapping buy: one model in one small pool, with each of them and without.

python -m benchmarks.savings [--trace lengths.csv]

n answers to each prompt, once with their prompt computed once and its blocks shared, once as n
requests that share nothing; requests behind one system prompt, with the prefix cache and without;
and a crowd that the pool cannot hold, its preempted sequences swapped to host memory or, as the
engine does by default, computed again as far as the prefix cache has lost them: that cache is on in
both, and only swap_space differs. Prompts are random tokens, lengths of answers are forced. Rates
count generated tokens; all runs of a pair generate the same number of them.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.arguments import BLOCK_SIZES, at_least_one, existing_file
from benchmarks.lengths import RequestLengths, clipped_lengths, random_prompts
from benchmarks.measure import Timing, interleaved, provenance
from jpaged import LLM, SamplingParams

DEFAULT, UNCACHED, SWAPPING = "default", "uncached", "swapping"
ENGINES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    UNCACHED: {"enable_prefix_caching": False},
    SWAPPING: {"swap_space": 1.0},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one engine is asked: `n` answers to each prompt."""

    side: str  # of its pair
    engine: str
    prompts: list[list[int]]
    max_tokens: list[int]
    n: int = 1

    @property
    def num_tokens(self) -> int:
        """That it generates."""
        return self.n * sum(self.max_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Used:
    """What a run took of the engine."""

    computed_tokens: int
    steps: int
    preemptions: int
    swapped_out_blocks: int
    mean_rows: float  # sequences in a step


def main() -> None:
    """Prints a table for people and, last, one JSON line."""
    options = _options()
    lengths = _lengths(options)
    engines = {name: _engine(options, extra) for name, extra in ENGINES.items()}
    vocab_size = engines[DEFAULT].engine.runner.model.vocab_size
    pairs = _pairs(lengths, options, vocab_size=vocab_size)
    used: dict[str, Used] = {}

    works = {f"{title}, {work.side}": work for title, pair in pairs.items() for work in pair}

    def run(name: str) -> None:
        work = works[name]
        used[name] = _run(engines[work.engine], work)

    def prepare(name: str) -> None:
        """What an engine has not touched for minutes may be swapped out."""
        engines[works[name].engine].generate([[1]], SamplingParams(max_tokens=4), use_tqdm=False)

    runs = {name: functools.partial(run, name) for name in works}
    timings = interleaved(runs, repeats=options.repeats, prepare=prepare)
    report = [_compared(title, pair, timings, used) for title, pair in pairs.items()]
    _print_table(report)
    model = engines[DEFAULT].model_source
    figures = {"benchmark": "savings", "num_blocks": options.num_blocks, "pairs": report}
    figures["lengths"] = options.trace or f"ShareGPT's law, seed {options.seed}"
    print(json.dumps({**figures, "model": model, **provenance()}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.savings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="directory, .gguf file or hub id; by default the default model")
    add("--dtype", default="float32")
    add("--trace", type=existing_file, help="CSV with input_tokens, output_tokens, or Mooncake")
    add("--sequences", type=at_least_one, default=48, help="answers that each run generates")
    add("--parallel", type=at_least_one, nargs="+", default=[2, 4, 6], help="answers to a prompt")
    add("--system-prompt", type=at_least_one, default=512, help="tokens of the system prompt")
    add("--max-input", type=at_least_one, default=512, help="longer prompts are clipped")
    add("--max-output", type=at_least_one, default=128, help="longer answers are clipped")
    add("--num-blocks", type=at_least_one, default=193, help="of each engine, null block counted")
    add("--block-size", type=int, choices=BLOCK_SIZES, default=16)
    add("--repeats", type=at_least_one, default=5)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def _engine(options: argparse.Namespace, extra: Mapping[str, Any]) -> LLM:
    print(f"warming up an engine with {dict(extra)}", file=sys.stderr)
    return LLM(
        options.model,
        dtype=options.dtype,
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        max_num_seqs=min(64, options.sequences),
        max_model_len=options.system_prompt + options.max_input + options.max_output,
        use_tqdm=False,
        **extra,
    )


def _lengths(options: argparse.Namespace) -> list[RequestLengths]:
    return clipped_lengths(
        options.trace,
        options.sequences,
        seed=options.seed,
        max_input=options.max_input,
        max_output=options.max_output,
    )


def _pairs(
    lengths: list[RequestLengths], options: argparse.Namespace, *, vocab_size: int
) -> dict[str, tuple[Work, Work]]:
    """By title, what is run with something and what without it, in this order."""
    count, seed = options.sequences, options.seed
    prompts = random_prompts(lengths, vocab_size=vocab_size, seed=seed)
    limits = [pair.output_tokens for pair in lengths]
    pairs = {}
    for n in options.parallel:
        num = max(1, count // n)
        together = Work(
            side="sharing", engine=DEFAULT, prompts=prompts[:num], max_tokens=limits[:num], n=n
        )
        apart = [prompt for prompt in prompts[:num] for _ in range(n)]
        tokens = [limit for limit in limits[:num] for _ in range(n)]
        pairs[f"n = {n}"] = (
            together,
            Work(side="not sharing", engine=UNCACHED, prompts=apart, max_tokens=tokens),
        )
    system = RequestLengths(input_tokens=options.system_prompt, output_tokens=1)
    (start,) = random_prompts([system], vocab_size=vocab_size, seed=seed + 1)
    behind = [[*start, *prompt] for prompt in prompts]
    pairs["system prompt"] = (
        Work(side="sharing", engine=DEFAULT, prompts=behind, max_tokens=limits),
        Work(side="not sharing", engine=UNCACHED, prompts=behind, max_tokens=limits),
    )
    pairs["a crowd"] = (
        Work(side="swapping", engine=SWAPPING, prompts=prompts, max_tokens=limits),
        Work(side="recomputing", engine=DEFAULT, prompts=prompts, max_tokens=limits),
    )
    return pairs


def _run(llm: LLM, work: Work) -> Used:
    assert llm.reset_prefix_cache(), "an earlier round left its prompts"
    before = dataclasses.replace(llm.engine.scheduler.counters)
    params = [
        SamplingParams(n=work.n, max_tokens=limit, seed=index, ignore_eos=True, detokenize=False)
        for index, limit in enumerate(work.max_tokens)
    ]
    outputs = llm.generate(work.prompts, params, use_tqdm=False)
    found = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    assert found == work.num_tokens, f"{found} tokens came, {work.num_tokens} were asked for"
    now = llm.engine.scheduler.counters
    steps = now.steps - before.steps
    return Used(
        computed_tokens=now.computed_tokens - before.computed_tokens,
        steps=steps,
        preemptions=now.preemptions - before.preemptions,
        swapped_out_blocks=now.swapped_out_blocks - before.swapped_out_blocks,
        mean_rows=(now.rows - before.rows) / steps,
    )


def _compared(
    title: str, pair: tuple[Work, Work], timings: Mapping[str, Timing], used: Mapping[str, Used]
) -> dict:
    sides = {}
    for work in pair:
        name = f"{title}, {work.side}"
        sides[work.side] = {
            "tokens_per_s": round(work.num_tokens / timings[name].median, 1),
            "seconds": [round(second, 2) for second in timings[name].seconds],
            "others_share": timings[name].others_share,
            **dataclasses.asdict(used[name]),
        }
    first, second = (timings[f"{title}, {work.side}"].median for work in pair)
    return {"work": title, "faster": round(second / first, 2), "sides": sides}


def _print_table(report: list[dict]) -> None:
    print(
        f"{'work':16} {'side':11} {'tokens/s':>9} {'faster':>7} {'sequences a step':>17} "
        f"{'steps':>6} {'tokens computed':>16} {'preemptions':>12} {'swapped':>8}"
    )
    for pair in report:
        faster = f"{pair['faster']:6.2f}x"
        for name, side in pair["sides"].items():
            print(
                f"{pair['work']:16} {name:11} {side['tokens_per_s']:9.1f} {faster:>7} "
                f"{side['mean_rows']:17.1f} {side['steps']:6} {side['computed_tokens']:16} "
                f"{side['preemptions']:12} {side['swapped_out_blocks']:8}"
            )
            faster = ""


if __name__ == "__main__":
    main()
