"""What a caller gets back, in vLLM's shapes."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jpaged.requests import Request, Sequence

MAX_SHOWN = 60  # characters of a text in a repr: a notebook line


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one position; `rank` 1 is the likeliest."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class CompletionOutput:
    """One sequence of the answer, as far as it is known."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    score: float | None = None  # of a beam: cumulative_logprob / len(token_ids) ** length_penalty

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        reason = "" if self.stop_reason is None else f", stop_reason={self.stop_reason!r}"
        score = "" if self.score is None else f", score={self.score:.4f}"
        return (
            f"CompletionOutput(index={self.index}, text={self.text!r}, "
            f"token_ids=<{len(self.token_ids)} tokens>, finish_reason={self.finish_reason!r}"
            f"{reason}{score})"
        )


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class RequestOutput:
    """The answer to one prompt: `outputs` has one entry for each of its `n` sequences."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool

    @property
    def text(self) -> str:
        """The first sequence's text."""
        return self.outputs[0].text

    def __repr__(self) -> str:
        prompt = f"<{len(self.prompt_token_ids)} tokens>"
        if self.prompt is not None:
            prompt = repr(_shortened(self.prompt))
        outputs = ",\n  ".join(map(repr, self.outputs))
        return (
            f"RequestOutput(request_id={self.request_id!r}, prompt={prompt}, "
            f"finished={self.finished}, outputs=[\n  {outputs}])"
        )


def request_output(request: "Request") -> RequestOutput:
    """A snapshot of the request's answer; later steps do not change it."""
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=[_completion_output(sequence) for sequence in request.returned],
        finished=request.finished,
    )


def output_delta(output: RequestOutput, seen: RequestOutput | None) -> RequestOutput:
    """What `output` has beyond `seen`, an earlier snapshot of the same request."""
    if seen is None:
        return output
    pairs = zip(output.outputs, seen.outputs, strict=True)
    return dataclasses.replace(output, outputs=[_completion_delta(new, old) for new, old in pairs])


def _completion_delta(new: CompletionOutput, old: CompletionOutput) -> CompletionOutput:
    logprobs = new.logprobs
    return dataclasses.replace(
        new,
        text=new.text[len(old.text) :],
        token_ids=new.token_ids[len(old.token_ids) :],
        logprobs=None if logprobs is None else logprobs[len(old.logprobs or ()) :],
    )


def _completion_output(sequence: "Sequence") -> CompletionOutput:
    params, found = sequence.request.params, sequence.hypothesis
    total = None if params.num_logprobs is None else sequence.cumulative_logprob
    return CompletionOutput(
        index=sequence.index,
        text=sequence.text,
        token_ids=sequence.output_token_ids,
        cumulative_logprob=total if found is None else found.beam.logprob,
        logprobs=None if params.logprobs is None else list(sequence.logprobs),
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        score=None if found is None else found.score,
    )


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
