"""Whether a sequence has come to its end, and why."""

from collections.abc import Container

from jpaged.requests import FinishReason, Sequence


def settle(sequence: Sequence, eos_token_ids: Container[int], *, again: bool = False) -> None:
    """Brings the text up to the newest token, and ends the sequence if that token says so.

    Safe to repeat; `again` starts the text and the sums over, in case a call was cut short.
    """
    if again:
        _start_over(sequence)
    params, num_output = sequence.request.params, sequence.num_output_tokens
    if num_output == 0:
        return
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token = sequence.token_ids[-1]
    if num_output > params.min_tokens:
        if token in params.stop_token_ids:
            reason, stop_reason = "stop", token
        elif token in eos_token_ids and not params.ignore_eos:
            reason = "stop"
    matched = _feed(sequence, whole=reason is None or params.include_stop_str_in_output)
    if matched is not None:
        reason, stop_reason = "stop", matched
    elif reason is None and len(sequence.token_ids) >= sequence.max_num_tokens:
        reason = "length"
    if reason is not None:
        finish(sequence, reason, stop_reason)


def finish(sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
    """Ends the sequence and settles its text."""
    if sequence.detokenizer is not None:
        sequence.detokenizer.finish()
    sequence.stop_reason = stop_reason
    sequence.finish_reason = reason  # last: from here on the sequence is finished


def _start_over(sequence: Sequence) -> None:
    del sequence.logprobs[sequence.num_output_tokens :]
    new_ids = sequence.output_token_ids
    sequence.cumulative_logprob = sum(
        logprobs[token].logprob for token, logprobs in zip(new_ids, sequence.logprobs, strict=False)
    )
    if sequence.detokenizer is not None:
        sequence.detokenizer.reset()


def _feed(sequence: Sequence, *, whole: bool) -> str | None:
    """Feeds the detokenizer, without the newest token where it only says that the text ends."""
    if sequence.detokenizer is None:
        return None
    token_ids = sequence.token_ids if whole else sequence.token_ids[:-1]
    return sequence.detokenizer.feed(token_ids)
