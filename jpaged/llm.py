"""The offline API: one model, one pool, one thread."""

import inspect
import os
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from jpaged.beams import BeamSearchParams
from jpaged.config import DEFAULT_MAX_WAITING
from jpaged.desk import Desk
from jpaged.engine import Engine
from jpaged.loading import build_engine
from jpaged.messages import as_conversations
from jpaged.options import Options
from jpaged.outputs import RequestOutput
from jpaged.params import SamplingParams, checked_flag, checked_text
from jpaged.prompts import (
    Prompt,
    RequestMaker,
    as_beam_params,
    as_params,
    as_priorities,
    as_prompts,
    checked_priority,
    one_params,
)
from jpaged.requests import Request
from jpaged.snapshot import Snapshot, take_snapshot
from jpaged.stats import Stats
from jpaged.trace import StepRecord


class LLM:
    """A language model over a paged KV pool. For one thread; `AsyncLLM` serves many callers.

    Args:
        model: a directory in Hugging Face's layout or of `jpaged convert`, a .gguf file, a hub id,
            or "tiny", a small model that comes along; by default SmolLM2-135M-Instruct, from its
            data package where that is installed.
        revision: a branch, tag or commit on the hub.
        dtype: "float32", "bfloat16", "float16", such a dtype itself, or "auto": float32 on a CPU,
            else the checkpoint's (bfloat16 for a quantised file, float16 where a GPU has no
            bfloat16).
        block_size: token positions a block, a power of two from 8 to 128; 16 by default.
        num_blocks: blocks in the pool, the null block counted; by default what memory allows.
        memory_fraction: the share of an accelerator's memory that may be used in all;
            `gpu_memory_utilization` is another name for it.
        swap_space: GiB of host memory in which preempted sequences keep what was computed of them;
            by default 0: they are computed again, from what is still cached.
        max_num_seqs: sequences that run at once; 64 on a CPU, else 256.
        max_num_batched_tokens: tokens a step; 256 on a CPU, else 2048.
        max_model_len: the longest prompt and answer together; the model's, at most 8192.
        max_waiting: sequences that may wait for a step to start them, those of one call together;
            QueueFullError refuses what is more.
        seed: of the seeds drawn for requests that bring none.
        enable_prefix_caching: keep finished blocks, and share those whose prefix comes again.
        async_scheduling: plan a step while the device computes the one before it.
        attention_backend: "auto", "cpu", "xla", "pallas-tpu", "pallas-gpu", "mosaic-gpu" and, for
            tests, "reference", "pallas-tpu-interpret", "pallas-gpu-interpret" and
            "mosaic-gpu-interpret".
        warm_up: compile every common program now; otherwise each when it is first needed.
        use_tqdm: whether loading and warm-up show their progress.

    Raises:
        ValueError: the model cannot be loaded, or an option is out of range.
        TypeError: an option is unknown or of a wrong type.
    """

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        memory_fraction: float | None = None,
        gpu_memory_utilization: float | None = None,
        swap_space: float = 0.0,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        max_waiting: int = DEFAULT_MAX_WAITING,
        seed: int = 0,
        enable_prefix_caching: bool = True,
        async_scheduling: bool = True,
        attention_backend: str = "auto",
        warm_up: bool = True,
        use_tqdm: bool = True,
    ) -> None:
        options = Options(
            model=model,
            revision=revision,
            dtype=dtype,
            block_size=block_size,
            num_blocks=num_blocks,
            memory_fraction=memory_fraction,
            gpu_memory_utilization=gpu_memory_utilization,
            swap_space=swap_space,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_waiting=max_waiting,
            seed=seed,
            enable_prefix_caching=enable_prefix_caching,
            async_scheduling=async_scheduling,
            attention_backend=attention_backend,
            warm_up=warm_up,
            use_tqdm=use_tqdm,
        )
        built = build_engine(options)
        self.engine: Engine = built.engine
        self.model_source: str = built.source
        self.model_config = built.engine.runner.model
        self.tokenizer = built.engine.tokenizer
        self._maker = RequestMaker(self.model_config, self.tokenizer, seed=options.seed)
        self._desk = Desk(self.engine, self._maker)
        if warm_up:
            self._warm_up(progress=use_tqdm)

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | SequenceOf[int] | None = None,
    ) -> list[RequestOutput]:
        """The answers to all prompts, in their order.

        One bad prompt refuses the whole call before anything runs. Those of a lower `priority`
        run first; it is one for all, or one for each, and 0 by default. If a step fails twice,
        EngineFailedError carries in `outputs` what was finished.
        """
        checked_flag("use_tqdm", use_tqdm)
        each = as_prompts(prompts)
        params = as_params(sampling_params, len(each))
        priorities = as_priorities(priority, len(each))
        make = self._maker.make
        requests = [make(*one) for one in zip(each, params, priorities, strict=True)]
        return self._desk.run(requests, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: SequenceOf[dict] | SequenceOf[SequenceOf[dict]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        use_tqdm: bool = True,
        priority: int | SequenceOf[int] | None = None,
    ) -> list[RequestOutput]:
        """The answers to one conversation or several, written out by the model's own template.

        A message is a dict with role and content: text, or a list of text parts as OpenAI has them.
        """
        checked_flag("add_generation_prompt", add_generation_prompt)
        checked_flag("use_tqdm", use_tqdm)
        conversations = as_conversations(messages)
        params = as_params(sampling_params, len(conversations))
        priorities = as_priorities(priority, len(conversations))
        requests = []
        for conversation, one, its_priority in zip(conversations, params, priorities, strict=True):
            text = self._render(conversation, add_generation_prompt=add_generation_prompt)
            token_ids = self._maker.encode(text, add_special_tokens=False)
            requests.append(self._maker.make_tokenized(token_ids, one, text, its_priority))
        return self._desk.run(requests, use_tqdm=use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: BeamSearchParams | SequenceOf[BeamSearchParams],
        *,
        use_tqdm: bool = True,
        priority: int | SequenceOf[int] | None = None,
    ) -> list[RequestOutput]:
        """What beam search finds for all prompts, in their order; each one's `outputs` best first.

        The same as Transformers' `generate(num_beams=...)`. Errors and `priority` as in `generate`.
        """
        checked_flag("use_tqdm", use_tqdm)
        each = as_prompts(prompts)
        every = as_beam_params(params, len(each)), as_priorities(priority, len(each))
        requests = [self._make_beams(*one) for one in zip(each, *every, strict=True)]
        return self._desk.run(requests, use_tqdm=use_tqdm)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
    ) -> Iterator[RequestOutput]:
        """The answer as it grows: each output holds only what is new. Closing it aborts."""
        request = self._make(prompt, sampling_params, priority)
        if request.params.ranks:
            raise ValueError(
                f"best_of={request.params.best_of} is decided when all have ended, so there is "
                "nothing to stream; call generate, or leave best_of out"
            )
        self._desk.validate(request)
        return self._desk.stream(request)

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | BeamSearchParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Queues a prompt and returns its request id; `step` brings the answer.

        A `request_id` that is given must not be that of a request whose end `step` has not told.
        With `BeamSearchParams` the answer comes whole, at the end.
        """
        if isinstance(sampling_params, BeamSearchParams):
            request = self._make_beams(prompt, sampling_params, checked_priority(priority))
        else:
            request = self._make(prompt, sampling_params, priority)
        if request_id is not None:
            request.request_id = self._desk.checked_id(request_id)
        return self._desk.submit(request)

    def step(self) -> list[RequestOutput]:
        """Runs one step; what has changed since it was last asked, each in full so far."""
        return self._desk.step()

    def abort(self, request_id: str) -> None:
        """Ends a request and frees its blocks; an unknown or finished one is left alone."""
        self._desk.abort(checked_text("request_id", request_id))

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do or to say."""
        return self.engine.scheduler.has_work or self._desk.has_news

    def stats(self) -> Stats:
        """What runs, what waits, how full the pool is, and how many programs were compiled."""
        return self.engine.stats()

    def snapshot(self) -> Snapshot:
        """Every block of the pool and every block table; `jpaged.show(llm)` draws them."""
        return take_snapshot(self.engine.scheduler)

    def trace(self) -> AbstractContextManager[list[StepRecord]]:
        """Records the steps: `with llm.trace() as steps: ...`, then `pandas.DataFrame(steps)`.

        The list has a dict for each step so far, whoever asked for it: its number, `time` at its
        end since the trace began and `seconds` it took; rows `running` in it and sequences
        `waiting` after it; `tokens` computed, in `prefills` and `decodes` rows; blocks, `waste` and
        `saving` as `stats()` means them, while it ran; and its own share of the totals there.
        `jpaged.save_trace(steps, path)` makes a timeline of it.
        """
        return self._desk.recorder.trace()

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix; False, and nothing done, while requests hold blocks."""
        return self.engine.scheduler.reset_prefix_cache()

    def update_weights(self, params: Any) -> None:
        """Gives the live engine other parameters, between two steps; nothing is compiled.

        What is generated from now on is what a fresh engine with these parameters would generate;
        requests that run keep their tokens so far, and all keys and values are computed anew. So
        the prefix cache is empty afterwards. This is the step of a reinforcement-learning loop
        between an optimizer's update and the next rollout.

        Args:
            params: a decoder, its `nnx.state(decoder, nnx.Param)`, or nested dicts of arrays as
                `jpaged_models.params_of(decoder)` gives them, on the host or a device. They are
                copied and cast to the engine's dtype.

        Raises:
            ValueError: a parameter is missing, unknown, deleted, of another shape or no floats;
                nothing has changed.
            TypeError: they are no arrays, or not in dicts.
        """
        self._desk.update_weights(params)

    def close(self) -> None:
        """Deletes the device arrays and gives up what still runs. Safe to repeat."""
        self._desk.close()
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _warm_up(self, *, progress: bool) -> None:
        try:
            self.engine.runner.warm_up(progress=progress)
        except BaseException:  # whoever keeps the traceback would keep weights and pool
            self.close()
            raise

    def _make(
        self, prompt: Prompt, sampling_params: SamplingParams | None, priority: int
    ) -> Request:
        params = one_params(sampling_params)
        return self._maker.make(prompt, params, checked_priority(priority))

    def _make_beams(self, prompt: Prompt, params: BeamSearchParams, priority: int) -> Request:
        longest = self.engine.scheduler.config.max_model_len
        return self._maker.make_beams(prompt, params, priority, max_model_len=longest)

    def _render(self, conversation: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        template = self.tokenizer.chat_template if self.tokenizer else None
        if template is None:
            raise ValueError(
                f"{self.model_source} has no chat template; write the prompt out and call generate"
            )
        return template.render(conversation, add_generation_prompt=add_generation_prompt)


def check_options(given: dict[str, Any]) -> None:
    """Raises what `LLM(**given)` would raise over its arguments alone; loads nothing."""
    defaults = {p.name: p.default for p in inspect.signature(LLM).parameters.values()}
    Options(**defaults | given)
