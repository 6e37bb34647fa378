"""The online API: many streams at once over one engine thread."""

import asyncio
import contextlib
import inspect
import os
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple, Self

from jpaged.beams import BeamSearchParams
from jpaged.errors import EngineFailedError
from jpaged.llm import LLM, check_options
from jpaged.outputs import RequestOutput, request_output
from jpaged.params import SamplingParams
from jpaged.prompts import Prompt, as_beam_params, one_params
from jpaged.requests import Request
from jpaged.snapshot import Snapshot
from jpaged.stats import Stats
from jpaged.trace import StepRecord
from jpaged_models import Tokenizer


class AsyncLLM:
    """A language model that serves many tasks of one event loop; its thread owns an `LLM`.

    The model loads in `async with`, `start()` or the first call, whichever comes first. All that
    touches the engine runs in its one thread, in the order it was asked for; a step queues the
    next one behind what was asked meanwhile, so an idle engine sleeps.

    Args:
        model: as `LLM` takes it.
        options: as `LLM` takes them (dtype, block_size, num_blocks, max_num_seqs, ...).

    Raises:
        TypeError: an option is unknown or of a wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, model: str | os.PathLike | None = None, **options: Any) -> None:
        _check_names(options)
        check_options({"model": model, **options})
        self._model = model
        self._options = options
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jpaged-engine")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[None] | None = None
        self._closed: asyncio.Future[None] | None = None
        # The engine thread's own.
        self._llm: LLM | None = None
        self._streams: dict[str, _Stream] = {}
        self._step_is_queued = False
        # Shared by both threads: what the loop has not taken yet, the newest of each stream.
        self._lock = threading.Lock()
        self._news: dict[_Stream, _News] = {}

    async def start(self) -> None:
        """Loads the model; returns at once where that is done."""
        if self._closed is not None:
            raise RuntimeError("this AsyncLLM is closed; make another")
        loop = asyncio.get_running_loop()
        if self._started is None:
            self._loop = loop
            self._started = loop.run_in_executor(self._thread, self._load)
        if self._loop is not loop:
            raise RuntimeError("this AsyncLLM belongs to another event loop; make one for each")
        await asyncio.shield(self._started)  # one impatient task must not stop it for the others

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The answer as it grows: each output holds all of it so far, the last is `finished`.

        A slow reader gets the newest output and misses some before it. With `best_of`, which
        sequences those are may change until the last. Requests of a lower `priority` run first.
        Cancelling the task or closing the generator aborts the request and frees its blocks.

        Raises:
            ValueError: the prompt or its parameters are refused.
            TypeError: a value is of a wrong type.
            QueueFullError: too many sequences wait already.
            EngineFailedError: the request failed, or `close` came first; what was generated is in
                `outputs`.
        """
        return self._answers(prompt, one_params(sampling_params), priority)

    async def beam_search(
        self, prompt: Prompt, params: BeamSearchParams, *, priority: int = 0
    ) -> RequestOutput:
        """What beam search finds, best first, as `LLM.beam_search`; raises what `generate` does.

        Cancelling the task aborts the search and frees its blocks.
        """
        (beam_params,) = as_beam_params(params, 1)
        async with contextlib.aclosing(self._answers(prompt, beam_params, priority)) as answers:
            return [output async for output in answers][-1]

    async def _answers(
        self, prompt: Prompt, params: SamplingParams | BeamSearchParams, priority: int
    ) -> AsyncGenerator[RequestOutput, None]:
        await self.start()
        stream = _Stream()
        try:
            await self._ask(self._submit, stream, prompt, params, priority)
            while not stream.ended:
                yield await stream.next()
        finally:
            # Also where the task was cancelled before it heard that the request was queued: the
            # thread keeps the order, so the abort comes after. Nothing to do after `close`.
            if not stream.ended and self._closed is None:
                self._thread.submit(self._abort, stream)

    async def stats(self) -> Stats:
        """What runs, what waits, how full the pool is, and how many programs were compiled."""
        await self.start()
        return await self._ask(lambda: self._open_llm().stats())

    async def snapshot(self) -> Snapshot:
        """Every block of the pool and every block table; `await jpaged.show(llm)` draws them."""
        await self.start()
        return await self._ask(lambda: self._open_llm().snapshot())

    async def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix; False, and nothing done, while requests hold blocks."""
        await self.start()
        return await self._ask(lambda: self._open_llm().reset_prefix_cache())

    async def update_weights(self, params: Any) -> None:
        """Gives the live engine other parameters, between two steps, as `LLM.update_weights`."""
        await self.start()
        await self._ask(lambda: self._open_llm().update_weights(params))

    def trace(self) -> AbstractContextManager[list[StepRecord]]:
        """Records the steps, as `LLM.trace` does; the list grows while the task waits."""
        return self._open_llm().trace()

    @property
    def model_source(self) -> str:
        """Which file or hub revision was loaded."""
        return self._open_llm().model_source

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None where it has none.

        A conversation becomes a prompt by it: `chat_template.render(messages)` is the text, and
        `encode(text, add_special_tokens=False)` what `generate` takes.
        """
        return self._open_llm().tokenizer

    async def close(self) -> None:
        """Frees the model; streams that still run get EngineFailedError. Safe to repeat."""
        await asyncio.shield(self._begin_close())
        self._thread.shutdown()  # its last task is done: this only waits for the thread to end

    aclose = close  # the name that contextlib.aclosing calls

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            # Without waiting: a cancelled task should end now, not when the model has loaded.
            self._begin_close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # In the event loop's thread.

    async def _ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """The function's result, or its exception, from the engine thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _begin_close(self) -> "asyncio.Future[None]":
        if self._closed is None:
            self._closed = asyncio.get_running_loop().run_in_executor(self._thread, self._unload)
        return self._closed

    def _deliver(self) -> None:
        with self._lock:
            news, self._news = self._news, {}
        for stream, newest in news.items():
            stream.put(newest)

    # In the engine thread, but for `_open_llm`.

    def _load(self) -> None:
        self._llm = LLM(self._model, **self._options)

    def _unload(self) -> None:
        if self._llm is not None:
            self._end_all("the engine was closed while the request ran")
            self._llm.close()
            self._llm = None
        self._thread.shutdown(wait=False)

    def _open_llm(self) -> LLM:
        if self._llm is None:
            raise RuntimeError("this AsyncLLM is not open; use `async with`, or make another")
        return self._llm

    def _submit(
        self,
        stream: "_Stream",
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams,
        priority: int,
    ) -> None:
        llm = self._open_llm()
        request_id = llm.submit(prompt, params, priority=priority)
        stream.request = llm.engine.scheduler.requests[request_id]
        self._streams[request_id] = stream
        self._queue_step()

    def _abort(self, stream: "_Stream") -> None:
        request = stream.request
        if request is not None and self._streams.get(request.request_id) is stream:
            del self._streams[request.request_id]
            self._open_llm().abort(request.request_id)

    def _queue_step(self) -> None:
        if not self._step_is_queued and self._open_llm().has_unfinished_requests:
            self._thread.submit(self._step).add_done_callback(self._check_step)
            self._step_is_queued = True

    def _step(self) -> None:
        self._step_is_queued = False
        if self._llm is None:  # closed meanwhile
            return
        news: dict[_Stream, _News] = {}
        for output in self._llm.step():
            stream = self._streams.get(output.request_id)
            if stream is None:  # aborted meanwhile
                continue
            news[stream] = _News(output, stream.failure(output))
            if output.finished:
                del self._streams[output.request_id]
        self._publish(news)
        self._queue_step()

    def _check_step(self, step: Future) -> None:
        """Ends all streams where the engine raised, rather than let them wait for ever."""
        error = step.exception()
        if error is not None:
            self._end_all(f"the engine failed: {error!r}", cause=error)

    def _end_all(self, message: str, *, cause: BaseException | None = None) -> None:
        """Aborts every request and raises EngineFailedError in its stream."""
        streams = list(self._streams.values())
        for stream in streams:
            self._abort(stream)
        self._publish({stream: _News(None, stream.ended_by(message, cause)) for stream in streams})

    def _publish(self, news: "dict[_Stream, _News]") -> None:
        with self._lock:
            loop_is_told = bool(self._news)
            self._news.update(news)
        if loop_is_told or not news or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop was closed without us: nobody listens any more
            for stream in list(self._streams.values()):
                self._abort(stream)


class _News(NamedTuple):
    """The newest answer of a stream, or the error that ended it."""

    output: RequestOutput | None
    error: EngineFailedError | None


class _Stream:
    """One reader's place: it holds the newest output only, so a slow reader costs no memory."""

    def __init__(self) -> None:
        self.request: Request | None = None  # the engine thread's; None until it is queued
        self.ended = False  # whether the reader has been told everything
        self._newest = _News(None, None)
        self._changed = asyncio.Event()

    def put(self, news: _News) -> None:
        self._newest = news
        self._changed.set()

    async def next(self) -> RequestOutput:
        await self._changed.wait()
        self._changed.clear()
        output, error = self._newest
        if error is not None:
            self.ended = True
            raise error
        assert output is not None, "news without an error bring an output"
        self.ended = output.finished
        return output

    def failure(self, output: RequestOutput) -> EngineFailedError | None:
        """What to raise instead of yielding `output`: where the request failed."""
        cause = self.request.error if self.request is not None else None
        if cause is None or not output.finished:
            return None
        return self.ended_by(f"the request failed: {cause}; the engine is usable", cause)

    def ended_by(self, message: str, cause: BaseException | None) -> EngineFailedError:
        assert self.request is not None, "a stream without a request is not among the streams"
        error = EngineFailedError(message, outputs=[request_output(self.request)])
        error.__cause__ = cause
        return error


def _check_names(options: dict[str, Any]) -> None:
    known = set(inspect.signature(LLM).parameters) - {"model"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"AsyncLLM() got unknown options {unknown}; it takes {sorted(known)}")
