"""Figures of a replay, under the names that vLLM's benchmark reports give them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from benchmarks.open_loop import Replay, Served

KINDS = ("ttft", "tpot", "itl", "e2el")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What users are promised, in milliseconds at most.

    A run keeps it if its p99 do: of the first token over all requests, of the time between two
    tokens over all tokens. A request keeps it by its own first token and its own p99.
    """

    ttft_ms: float
    itl_ms: float

    def kept_by(self, metrics: dict[str, float | None]) -> bool:
        """Whether a whole run keeps it; answers of one token each have no ITL to miss it with."""
        ttft, itl = metrics["p99_ttft_ms"], metrics["p99_itl_ms"]
        assert ttft is not None, "every request has a first token"
        return ttft <= self.ttft_ms and (itl is None or itl <= self.itl_ms)

    def kept_for(self, one: Served) -> bool:
        """Whether one request's user got what was promised."""
        gaps = _gaps(one)
        if 1e3 * (one.token_times[0] - one.arrival) > self.ttft_ms:
            return False
        return not gaps or 1e3 * float(np.percentile(gaps, 99)) <= self.itl_ms


def serving_metrics(run: Replay, objective: Objective) -> dict[str, float | None]:
    """Everything that is said of one run; milliseconds are rounded to thousandths."""
    good = sum(objective.kept_for(one) for one in run.served)
    return {
        **run_metrics(run),
        "request_goodput": round(good / run.seconds, 4),
        "good_requests": good,
    }


def run_metrics(run: Replay) -> dict[str, float | None]:
    """What is said of one run whatever was promised.

    A request's normalised latency is its E2EL for each token of its answer: Orca's and the vLLM
    paper's measure.
    """
    served = run.served
    inputs = sum(one.num_prompt for one in served)
    outputs = sum(len(one.token_ids) for one in served)
    seconds = sum(step for step, _ in run.held)
    return {
        "completed": len(served),
        "duration": round(run.seconds, 3),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": round(len(served) / run.seconds, 4),
        "output_throughput": round(outputs / run.seconds, 2),
        "total_token_throughput": round((inputs + outputs) / run.seconds, 2),
        **token_metrics(served),
        **summary("queue", [_start(one) - one.arrival for one in served]),
        **summary("normalised_latency", [_e2el(one) / len(one.token_ids) for one in served]),
        "users_at_once_mean": round(sum(s * held for s, held in run.held) / seconds, 2),
        "users_at_once_peak": max(held for _, held in run.held),
    }


def token_metrics(served: Sequence[Served]) -> dict[str, float | None]:
    """TTFT, TPOT, ITL and E2EL.

    TPOT is the mean of one request's gaps between tokens, and an answer of one token has none;
    ITL counts every gap of every request.
    """
    longer = [one for one in served if len(one.token_times) > 1]
    seconds = {
        "ttft": [one.token_times[0] - one.arrival for one in served],
        "tpot": [float(np.mean(_gaps(one))) for one in longer],
        "itl": [gap for one in served for gap in _gaps(one)],
        "e2el": [_e2el(one) for one in served],
    }
    figures = {}
    for kind in KINDS:
        figures |= summary(kind, seconds[kind])
    return figures


def summary(kind: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean, median and p99 in milliseconds; None of nothing."""
    figures = {
        "mean": np.mean(seconds) if seconds else None,
        "median": np.median(seconds) if seconds else None,
        "p99": np.percentile(seconds, 99) if seconds else None,
    }
    return {
        f"{name}_{kind}_ms": None if value is None else round(1e3 * float(value), 3)
        for name, value in figures.items()
    }


def _gaps(one: Served) -> list[float]:
    return np.diff(one.token_times).tolist()


def _e2el(one: Served) -> float:
    return one.token_times[-1] - one.arrival


def _start(one: Served) -> float:
    assert one.start is not None, "a request that got tokens has started"
    return one.start
