"""The conditions a caller of the engine may want to handle."""

from collections.abc import Sequence

from jpaged.outputs import RequestOutput


class JpagedError(Exception):
    """Every condition below, for a caller that treats them alike."""


class OutOfBlocksError(JpagedError):
    """The pool has fewer free blocks than were asked for; nothing was taken."""


class QueueFullError(JpagedError):
    """The waiting queue is full; the request was not taken, and may be sent again later."""


class EngineFailedError(JpagedError):
    """A step failed twice over this request, or the engine was closed under it.

    `outputs` holds what a call's requests have generated, finished or not.
    """

    def __init__(self, message: str, *, outputs: Sequence[RequestOutput] = ()) -> None:
        super().__init__(message)
        self.outputs = list(outputs)
