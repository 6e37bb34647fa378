"""Figure 17: normalised latency of chats, each prompt the whole conversation so far.

As in the paper, only the last tokens of a conversation are sent, --history of them. It computes
every round anew, and compares with Orca; here the prefix cache may find the rounds before, which is
what differs between the sides. Once a conversation is cut, its beginning is another one in every
round, and the cache finds nothing.

What users say is random, of ShareGPT's lengths; the answers in a history are the model's own, so
that their blocks can be found too, and are generated beforehand. Arrivals go round the sessions, so
a round may come before the one before it has been answered, as in an open loop it must.
"""

import argparse
import dataclasses

from benchmarks.lengths import RequestLengths
from benchmarks.paper.figure import Axis, Figure, Made, Workload, engine_line
from benchmarks.paper.prefix_cache import CACHE, cache_engines
from benchmarks.paper.workload import LENGTHS, basic_workload
from jpaged import LLM, SamplingParams


def make(options: argparse.Namespace) -> Made:
    """One panel: with the prefix cache, and without."""
    engines = cache_engines(options)
    llm = engines[CACHE]
    asked = basic_workload(options, vocab_size=llm.model_config.vocab_size)
    limits = [pair.output_tokens for pair in asked.trace.lengths]
    prompts = _converse(llm, asked.prompts, limits, options)
    lengths = [
        RequestLengths(input_tokens=len(prompt), output_tokens=limit)
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    workload = Workload(
        panel=f"up to {options.rounds} rounds, cut to {options.history} tokens",
        trace=dataclasses.replace(asked.trace, lengths=lengths),
        prompts=prompts,
    )
    lines = [engine_line(name, one, workload) for name, one in engines.items()]
    return Made(lines=lines, llms=list(engines.values()), model_source=llm.model_source)


def _converse(
    llm: LLM, questions: list[list[int]], limits: list[int], options: argparse.Namespace
) -> list[list[int]]:
    """What is sent in place of each question: all that was said in its session, and itself.

    The first round of all sessions comes first; the last round may lack some.
    """
    num_sessions = -(-len(questions) // options.rounds)
    histories: list[list[int]] = [[] for _ in range(num_sessions)]
    sent = []
    for first in range(0, len(questions), num_sessions):
        asked = slice(first, first + num_sessions)
        prompts = [
            [*history, *question][-options.history :]
            for history, question in zip(histories, questions[asked], strict=False)
        ]
        params = [
            SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True, detokenize=False)
            for limit in limits[asked]
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        histories = [
            [*prompt, *output.outputs[0].token_ids]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        sent += prompts
    return sent


def _longest(options: argparse.Namespace) -> int:
    return options.history + options.max_output


FIGURE = Figure(
    of_paper="17",
    title="chats, whose prompts are the conversation so far",
    axis=Axis.REQUEST_RATE,
    defaults={
        **LENGTHS,
        "length_scale": 0.25,
        "max_input": 96,  # of a question
        "max_output": 48,
        "requests": 18,
        "rates": [0.5, 1.0, 2.0],
        "repeats": 3,
        "rows": 4,
        "reserved": 768,
        "block_size": 16,
        "rounds": 6,
        "history": 512,
    },
    longest=_longest,
    make=make,
)
