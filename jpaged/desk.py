"""Where requests are handed in and their answers handed out, whoever drives the steps."""

import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from jpaged.detokenize import Detokenizer
from jpaged.engine import Engine
from jpaged.errors import EngineFailedError
from jpaged.outputs import RequestOutput, output_delta, request_output
from jpaged.params import checked_text
from jpaged.prompts import RequestMaker
from jpaged.requests import Request
from jpaged.trace import StepRecorder


class Desk:
    """Keeps the news of every request until the caller it belongs to takes them.

    So calls of all kinds may be mixed: a step that one of them runs serves the others too. What a
    call that is interrupted had handed in is ended, and nothing else.
    """

    def __init__(self, engine: Engine, maker: RequestMaker) -> None:
        self.engine = engine
        self.recorder = StepRecorder(engine.scheduler)
        self._maker = maker
        self._requests: dict[str, Request] = {}  # those whose end no caller has taken yet
        self._news: dict[str, Request] = {}  # those that changed since a caller asked
        self._news_lost = False  # whether a step was interrupted before its news were kept
        self._closed = False
        self._stepper: int | None = None  # the thread in whose hands the engine is

    @property
    def has_news(self) -> bool:
        """Whether there is anything that `step` has not told."""
        return bool(self._news) or (self._news_lost and bool(self._requests))

    def validate(self, request: Request) -> None:
        """Raises ValueError for a request that could never run to its end."""
        self._check_open()
        self.engine.scheduler.validate(request)

    def checked_id(self, request_id: str) -> str:
        """A caller's own request id, if no other request has it."""
        if not checked_text("request_id", request_id):
            raise ValueError("request_id is empty; give another, or None to have one drawn")
        if self._is_taken(request_id):
            raise ValueError(
                f"request_id {request_id!r} is in use by a request whose end `step` has not told; "
                "give another, or None to have one drawn"
            )
        return request_id

    def run(self, requests: list[Request], *, use_tqdm: bool) -> list[RequestOutput]:
        """Runs `requests` to their end, or aborts them all if that is interrupted."""
        finished: dict[str, RequestOutput] = {}
        total = len(requests)
        with tqdm(total=total, desc="generating", unit="request", disable=not use_tqdm) as bar:
            try:
                self._add(requests)
                waited_for = {request.request_id for request in requests}
                while len(finished) < total:
                    self._advance()
                    for request_id in waited_for & self._news.keys():
                        request = self._news.pop(request_id)
                        if request.finished:  # before that, nobody looks at the output
                            finished[request_id] = request_output(request)
                    bar.update(len(finished) - bar.n)
            finally:
                self._forget(requests)
        self._raise_failure(requests, finished)
        return [finished[request.request_id] for request in requests]

    def stream(self, request: Request) -> Iterator[RequestOutput]:
        """The request's output piece by piece; it is added when the first piece is asked for."""
        seen: RequestOutput | None = None
        try:
            self._add([request])
            while seen is None or not seen.finished:
                self._advance()
                if self._news.pop(request.request_id, None) is not None:
                    output = request_output(request)
                    yield output_delta(output, seen)
                    seen = output
        finally:
            self._forget([request])
        self._raise_failure([request], {request.request_id: seen})

    def submit(self, request: Request) -> str:
        """Queues the request; its id."""
        try:
            self._add([request])
        except BaseException:
            self._forget([request])  # nobody would know its id
            raise
        return request.request_id

    def step(self) -> list[RequestOutput]:
        """Runs one step; what has changed since this was last called, each in full so far."""
        self._advance()
        news = [request_output(request) for request in self._news.values()]
        for output in news:
            if output.finished:
                self._requests.pop(output.request_id, None)
        self._news = {}  # last: whoever is interrupted before it hears the news next time
        return news

    def abort(self, request_id: str) -> None:
        """Ends a request, which is news."""
        for sequence in self.engine.scheduler.abort(request_id):
            self._news[request_id] = sequence.request

    def update_weights(self, params: Any) -> None:
        """Other parameters for what is computed from now on; who has ended by then is news."""
        self._check_stepper()
        if self._stepper is not None:  # this very thread, in a signal's handler say
            raise RuntimeError("a step is under way; call update_weights between two of them")
        try:
            self._stepper = threading.get_ident()
            ended = self.engine.update_weights(params)
        finally:
            self._stepper = None
        for sequence in ended:
            self._news[sequence.request.request_id] = sequence.request

    def close(self) -> None:
        """Gives up what still runs and refuses what comes."""
        self._closed = True
        for request_id in list(self.engine.scheduler.requests):
            self.engine.scheduler.abort(request_id)

    def _raise_failure(self, requests: list[Request], finished: dict[str, RequestOutput]) -> None:
        failed = [request for request in requests if request.error is not None]
        if failed:
            outputs = [finished[request.request_id] for request in requests]
            raise EngineFailedError(
                f"{len(failed)} of {len(requests)} requests failed: {failed[0].error}; the "
                "engine is usable, and `outputs` of this error holds what was generated",
                outputs=outputs,
            ) from failed[0].error

    def _add(self, requests: list[Request]) -> None:
        """Checks all of `requests` and then queues them; whoever calls this forgets them again."""
        scheduler = self.engine.scheduler
        for request in requests:
            self.validate(request)
        scheduler.check_room(sum(len(request.sequences) for request in requests))
        for request in requests:
            self._maker.complete(request, self._is_taken)
            self._attach_detokenizers(request)
            scheduler.add(request)
            self._requests[request.request_id] = request  # after it, for `add` may refuse

    def _attach_detokenizers(self, request: Request) -> None:
        params = request.params
        if self.engine.tokenizer is None or not params.detokenize:
            return
        for sequence in request.sequences:
            sequence.detokenizer = Detokenizer(
                self.engine.tokenizer,
                prompt_token_ids=request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                stop=params.stop,
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )

    def _advance(self) -> None:
        """One step; its news are kept until the caller they belong to takes them."""
        self._check_stepper()
        if self._news_lost:
            self._news.update(self._requests)
        self._news_lost = True
        try:
            self._stepper = threading.get_ident()
            for sequence in self.recorder.run(self.engine.step):
                self._news[sequence.request.request_id] = sequence.request
        finally:
            self._stepper = None
        self._news_lost = False

    def _check_stepper(self) -> None:
        self._check_open()
        if self._stepper not in (None, threading.get_ident()):
            raise RuntimeError(
                "another thread runs a step of this LLM, which is for one thread at a time; use "
                "AsyncLLM to serve many"
            )

    def _is_taken(self, request_id: str) -> bool:
        return request_id in self._requests or request_id in self.engine.scheduler.requests

    def _forget(self, requests: list[Request]) -> None:
        """Ends the requests and drops their news, even if an interrupt cuts the first try short."""
        try:
            self._drop(requests)
        finally:
            self._drop(requests)

    def _drop(self, requests: list[Request]) -> None:
        scheduler = self.engine.scheduler
        scheduler.mend()  # one that was being added may wait there, unknown
        for request in requests:
            request_id = request.request_id
            # One that was refused may bear the id of another, which stays.
            if scheduler.requests.get(request_id) is request:
                scheduler.abort(request_id)
            if self._requests.get(request_id) is request:
                self._news.pop(request_id, None)
                del self._requests[request_id]

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this LLM is closed; make another")
