"""Random use of the scheduler, every promise checked after every operation.

python -m benchmarks.blast [--operations 1000000] [--seed 0] [--every 1]

Requests come, fork, search with beams, share prefixes, differ in priority, are aborted between and
during steps; steps fail; pools are so small that sequences are preempted; the prefix cache is
emptied. `jpaged.invariants.check` and the oracle that remembers what every slot holds watch, and
every answer must be the scripted one.
A life of 2,000 operations has one scheduler with limits drawn for it, and the seed after that of
the life before: a failure names its own, which alone replays it.
"""

import argparse
import collections
import contextlib
import json
import random
import time

from benchmarks.arguments import at_least_one
from benchmarks.measure import host_provenance
from benchmarks.oracle import WatchedScheduler
from benchmarks.scripted_beams import advance_beams, make_beam_request, scripted_search
from jpaged.beams import BeamSearchParams
from jpaged.config import EngineConfig
from jpaged.invariants import check
from jpaged.params import SamplingParams
from jpaged.plan import StepPlan
from jpaged.requests import Request, Sequence

LIFE = 2_000  # operations
EOS = 6
NUM_TOKENS = 7  # of the vocabulary: prompts and answers often begin alike
MAX_MODEL_LEN = 70


class BlastError(AssertionError):
    """A promise was broken; the message says how to see it again."""


class Life:
    """One scheduler under random use; `counts` says what was done to it."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        config = EngineConfig(
            block_size=rng.choice([8, 8, 16]),
            num_blocks=rng.randrange(9, 22),
            max_num_seqs=rng.randrange(2, 10),
            max_num_batched_tokens=rng.randrange(5, 80),
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=rng.random() < 0.9,
            num_swap_blocks=rng.choice([0, 0, 3, 12, 40]),
        )
        self.scheduler = WatchedScheduler(config, eos_token_ids=[EOS])
        self.known: dict[str, Request] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.num_submitted = 0
        self.most_known = rng.choice([12, 12, 40])  # forty keep more waiting than stand in front
        self.operations = {
            self.step: 60,
            self.submit: 22,
            self.submit_beams: 3,
            self.abort: 5,
            self.abort_during_a_step: 3,
            self.fail_a_step: 3,
            self.reset_prefix_cache: 4,
        }

    def operate(self, index: int) -> None:
        """One random operation; in every fourth stretch nothing comes in, so that all drains."""
        choices, weights = list(self.operations), list(self.operations.values())
        operation = self.rng.choices(choices, weights)[0]
        brings = operation in (self.submit, self.submit_beams)
        if brings and (index // 100 % 4 == 3 or len(self.known) >= self.most_known):
            operation = self.step
        operation()
        self._dismiss()

    def submit(self) -> None:
        """A request, whose prompt is one of few that begin alike."""
        rng, prompt = self.rng, self._prompt()
        room = self.scheduler.config.block_size * (self.scheduler.config.num_blocks - 1)
        request = Request(
            request_id=str(self.num_submitted),
            prompt=None,
            prompt_token_ids=prompt,
            params=SamplingParams(
                n=rng.choice([1, 1, 1, 2, 3, 4]),
                max_tokens=rng.randrange(1, max(2, min(60, room - len(prompt) + 1))),
                ignore_eos=rng.random() < 0.7,
                detokenize=False,
                cache_salt=rng.choice([None, None, "salt"]),
            ),
            seed=rng.randrange(1 << 20),
            priority=rng.choice([0, 0, 0, 1, -1]),
        )
        self._add(request)
        self.counts["forks"] += request.params.n - 1

    def submit_beams(self) -> None:
        """A beam search, as wide and as long as rows and pool may hold at once."""
        rng, prompt, config = self.rng, self._prompt(), self.scheduler.config
        widest = min(config.max_num_seqs, config.max_num_batched_tokens, NUM_TOKENS - 1)
        width = rng.randrange(1, widest + 1)
        room = _most_tokens(config, prompt, width)
        if room == 0:
            return
        request = make_beam_request(
            str(self.num_submitted),
            prompt,
            BeamSearchParams(
                beam_width=width,
                max_tokens=rng.randrange(1, room + 1),
                length_penalty=rng.choice([-1.0, 0.0, 1.0]),
                early_stopping=rng.choice([False, True, "never"]),
                ignore_eos=rng.random() < 0.7,
                detokenize=False,
                cache_salt=rng.choice([None, None, "salt"]),
            ),
            seed=rng.randrange(1 << 20),
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=[EOS],
            priority=rng.choice([0, 0, 0, 1, -1]),
        )
        self._add(request)
        self.counts["searches"] += 1

    def step(self) -> None:
        """Plans, checks the plan, commits the oldest; every other time one more stays in flight."""
        most = self.rng.choice([1, 2])
        while len(self.scheduler.in_flight) < most and (plan := self.scheduler.schedule()):
            check(self.scheduler, plan)
        if self.scheduler.in_flight:
            self._commit(self.scheduler.in_flight[0])
            self.counts["steps"] += 1

    def abort(self) -> None:
        """Ends one request between steps."""
        if self.known:
            self.scheduler.abort(self.rng.choice(list(self.known)))
            self.counts["aborted"] += 1

    def abort_during_a_step(self) -> None:
        """Ends one request while the device runs it, or others."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.scheduler.abort(self.rng.choice(list(self.known)))
            check(self.scheduler, plan)
            for plan in self.scheduler.in_flight:
                self._commit(plan)
            self.counts["aborted in a step"] += 1

    def fail_a_step(self) -> None:
        """The device fails: nothing that the step would have written can be trusted."""
        if self.scheduler.schedule() is not None:
            self.scheduler.recover()
            self.counts["failed steps"] += 1

    def reset_prefix_cache(self) -> None:
        """Empties the cache, which is refused while anything runs."""
        running = self.scheduler.num_running
        done = self.scheduler.reset_prefix_cache()
        assert done == (running == 0), f"reset said {done} with {running} sequences running"
        self.counts["resets" if done else "resets refused"] += 1

    def drain(self) -> None:
        """Runs what is left to its end."""
        for _ in range(5_000):
            if not self.scheduler.has_work:
                break
            self.step()
            self._dismiss()
        assert not self.known, f"{len(self.known)} requests never end"
        check(self.scheduler)
        counters = self.scheduler.counters
        self.counts["preemptions"] += counters.preemptions
        self.counts["copied blocks"] += counters.copied_blocks
        self.counts["swapped out"] += counters.swapped_out_blocks
        self.counts["swapped in"] += counters.swapped_in_blocks
        self.counts["hit tokens"] += counters.hit_tokens
        self.counts["generated tokens"] += counters.generated_tokens

    def _prompt(self) -> list[int]:
        """One of few that begin alike."""
        rng = self.rng
        prompt = [rng.randrange(3) // 2 for _ in range(6)] + [2] * 12 + [1, 3] * 16
        return prompt[: rng.randrange(1, 50)] + [rng.randrange(NUM_TOKENS)] * rng.randrange(3)

    def _add(self, request: Request) -> None:
        self.num_submitted += 1
        self.scheduler.add(request)
        self.known[request.request_id] = request
        self.counts["submitted"] += 1

    def _commit(self, plan: StepPlan) -> None:
        self.scheduler.commit(plan, _sampled(plan))
        advance_beams(self.scheduler, plan, num_tokens=NUM_TOKENS)
        self.counts["beams that waited"] += sum(
            sequence.candidates is not None for sequence in self.scheduler.running
        )

    def _dismiss(self) -> None:
        """Compares the answers of finished requests with the script, and forgets them."""
        for request in [request for request in self.known.values() if request.finished]:
            del self.known[request.request_id]
            for sequence, wanted in zip(request.sequences, _answers(request), strict=True):
                found = sequence.output_token_ids
                if sequence.finish_reason == "abort":
                    wanted = wanted[: len(found)]
                assert found == wanted, f"request {request.request_id}: {found}, not {wanted}"
            self.scheduler.oracle.forget(request.sequences)


def _most_tokens(config: EngineConfig, prompt: list[int], width: int) -> int:
    """Tokens, at most 30, that a search may generate behind the prompt; 0 if it never fits."""
    for max_tokens in range(30, 0, -1):
        with contextlib.suppress(ValueError):
            config.check_lengths(len(prompt), max_tokens, num_beams=width)
            return max_tokens
    return 0


def blast(num_operations: int, *, seed: int, every: int = 1) -> collections.Counter[str]:
    """What was done, summed over the lives; BlastError where a promise was broken."""
    counts: collections.Counter[str] = collections.Counter()
    for first in range(0, num_operations, LIFE):
        life_seed = seed + first // LIFE
        life = Life(life_seed)
        length = min(LIFE, num_operations - first)
        index = 0
        try:
            for index in range(length):
                life.operate(index)
                if index % every == 0:
                    check(life.scheduler)
            life.drain()
        except Exception as error:
            raise BlastError(
                f"operation {index} of the life with seed {life_seed}: {error!r}; again: "
                f"python -m benchmarks.blast --seed {life_seed} --operations {length}"
            ) from error
        counts += life.counts
    return counts


def main() -> None:
    """Prints the counts for people and, last, one JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.blast",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--operations", type=at_least_one, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=at_least_one, default=1, help="check after every so many")
    options = parser.parse_args()
    print(f"{options.operations} operations from seed {options.seed}", flush=True)
    start = time.perf_counter()
    counts = blast(options.operations, seed=options.seed, every=options.every)
    seconds = round(time.perf_counter() - start, 1)
    for name, count in sorted(counts.items()):
        print(f"{name:20} {count:12,}")
    print(f"every promise held, {seconds} s")
    report = {"benchmark": "blast", "operations": options.operations, "seed": options.seed}
    counts_and_time = {"check_every": options.every, "seconds": seconds, "counts": dict(counts)}
    print(json.dumps({**report, **counts_and_time, **host_provenance()}))


def _sampled(plan: StepPlan) -> list[int]:
    """What the device would send back; rubbish where a row does not sample."""
    return [_token(row.sequence, row.seq_len) if row.samples else -1 for row in plan.rows]


def _token(sequence: Sequence, position: int) -> int:
    """The token at `position`, like a model's: it depends on nothing else that runs."""
    return hash((sequence.request.seed, sequence.index, position)) % NUM_TOKENS


def _answers(request: Request) -> list[list[int]]:
    """What each sequence of a request says that nobody disturbs."""
    if request.search is None:
        return [_script(sequence) for sequence in request.sequences]
    if any(sequence.finish_reason == "abort" for sequence in request.sequences):
        return [sequence.output_token_ids for sequence in request.sequences]  # on its way anywhere
    found = scripted_search(request, num_tokens=NUM_TOKENS).finished
    return [hypothesis.beam.token_ids for hypothesis in found]


def _script(sequence: Sequence) -> list[int]:
    """The whole answer of a sequence that nobody disturbs."""
    params, num_prompt, answer = sequence.request.params, sequence.num_prompt_tokens, []
    assert params.max_tokens is not None, "every request here has a limit"
    for position in range(num_prompt, min(num_prompt + params.max_tokens, MAX_MODEL_LEN)):
        answer.append(_token(sequence, position))
        if answer[-1] == EOS and not params.ignore_eos:
            break
    return answer


if __name__ == "__main__":
    main()
