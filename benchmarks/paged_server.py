"""The paged engine as one side of an open loop."""

from benchmarks.arrivals import Arrival
from benchmarks.open_loop import Progress
from jpaged import LLM, SamplingParams


class PagedServer:
    """Hands requests to an `LLM` and counts what its steps bring; lengths are forced."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._numbers: dict[str, int] = {}  # of the requests that have not ended
        self._num_seen: dict[str, int] = {}  # of their tokens
        self._not_started: set[str] = set()

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended."""
        return self._llm.has_unfinished_requests

    @property
    def num_held(self) -> int:
        """Requests that hold blocks now."""
        return self._llm.engine.scheduler.num_running

    def submit(self, number: int, arrival: Arrival) -> None:
        """Queues a request."""
        params = SamplingParams(
            temperature=0, max_tokens=arrival.max_tokens, ignore_eos=True, detokenize=False
        )
        request_id = self._llm.submit(arrival.prompt, params)
        self._numbers[request_id] = number
        self._num_seen[request_id] = 0
        self._not_started.add(request_id)

    def step(self) -> Progress:
        """Runs a step of the engine."""
        tokens = {}
        outputs = self._llm.step()
        started = self._started({output.request_id for output in outputs})
        for output in outputs:
            token_ids = output.outputs[0].token_ids
            tokens[self._numbers[output.request_id]] = token_ids[
                self._num_seen[output.request_id] :
            ]
            self._num_seen[output.request_id] = len(token_ids)
            if output.finished:
                del self._numbers[output.request_id], self._num_seen[output.request_id]
        return Progress(started, tokens)

    def _started(self, answered: set[str]) -> list[int]:
        """Those that have got a row since the last step, by number."""
        requests = self._llm.engine.scheduler.requests
        found = {
            request_id
            for request_id in self._not_started
            if request_id in answered or requests[request_id].sequences[0].row is not None
        }
        self._not_started -= found
        return [self._numbers[request_id] for request_id in found]
