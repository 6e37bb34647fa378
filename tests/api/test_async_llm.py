"""Many streams over one engine: who gets what, and that nothing is held when they are gone."""

import asyncio
import contextlib
import itertools
import pathlib
import random
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from jpaged import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    EngineFailedError,
    QueueFullError,
    SamplingParams,
)
from jpaged.invariants import check
from jpaged.plan import StepPlan
from jpaged.programs import Outputs
from jpaged.step import StepOutput
from tests.helpers import LLM_OPTIONS

NUM_STREAMS = 200


def test_outputs_grow_and_the_last_equals_the_offline_answer(tiny_model_dir: pathlib.Path):
    prompts = ["the lazy dog", [5, 6, 7, 8, 9], "a block"]
    params = SamplingParams(temperature=0.9, seed=11, max_tokens=13, ignore_eos=True)
    with LLM(tiny_model_dir, **LLM_OPTIONS) as llm:
        offline = llm.generate(prompts, params)

    async def main(llm: AsyncLLM) -> None:
        async def read(prompt: Any) -> list:
            return [output async for output in llm.generate(prompt, params)]

        streams = await asyncio.gather(*(read(prompt) for prompt in prompts))
        for outputs, expected in zip(streams, offline, strict=True):
            texts = [output.text for output in outputs]
            assert all(new.startswith(old) for old, new in itertools.pairwise(texts))
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
            assert outputs[-1].outputs == expected.outputs

    run(tiny_model_dir, main)


def test_a_conversation_becomes_a_prompt_by_the_tokenizer(tiny_model_dir: pathlib.Path):
    messages = [{"role": "user", "content": "the lazy dog"}]
    params = SamplingParams(seed=4, max_tokens=9)
    with LLM(tiny_model_dir, **LLM_OPTIONS) as llm:
        (offline,) = llm.chat(messages, params)

    async def main(llm: AsyncLLM) -> None:
        tokenizer = llm.tokenizer
        assert tokenizer is not None
        prompt = tokenizer.apply_chat_template(messages)
        *_, last = [output async for output in llm.generate(prompt, params)]
        assert last.outputs == offline.outputs

    run(tiny_model_dir, main)


def test_two_hundred_streams_half_of_them_cancelled_leave_no_block_held(
    tiny_model_dir: pathlib.Path,
):
    rng = random.Random(3)
    doomed = set(rng.sample(range(NUM_STREAMS), NUM_STREAMS // 2))

    async def main(llm: AsyncLLM) -> None:
        async def read(index: int) -> str | None:
            # The doomed would run much longer than the test, were their requests not aborted.
            max_tokens = 120 if index in doomed else 2 + index % 17
            params = SamplingParams(seed=index, max_tokens=max_tokens, ignore_eos=True)
            prompt = [(7 * index + i) % 250 for i in range(1 + index % 37)]
            outputs = [output async for output in llm.generate(prompt, params)]
            return outputs[-1].outputs[0].finish_reason

        tasks = [asyncio.create_task(read(index)) for index in range(NUM_STREAMS)]
        cancelled = set()
        for index in rng.sample(sorted(doomed), len(doomed)):
            # Some before they are queued, some as they wait, some as they run.
            if rng.random() < 0.7:
                await asyncio.sleep(rng.random() * 0.01)
            if tasks[index].cancel():  # on a slow machine a few may have ended already
                cancelled.add(index)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {r for i, r in enumerate(results) if i not in cancelled} == {"length"}
        assert all(isinstance(results[index], asyncio.CancelledError) for index in cancelled)
        assert len(cancelled) > NUM_STREAMS // 4
        await assert_nothing_held(llm)

    run(tiny_model_dir, main)


def test_beams_are_those_of_the_offline_search_and_a_cancelled_search_frees_its_blocks(
    tiny_model_dir: pathlib.Path,
):
    prompts = ["the lazy dog", [5, 6, 7, 8, 9]]
    params = BeamSearchParams(beam_width=3, max_tokens=11)
    with LLM(tiny_model_dir, **LLM_OPTIONS) as llm:
        offline = llm.beam_search(prompts, params, use_tqdm=False)

    async def main(llm: AsyncLLM) -> None:
        found = await asyncio.gather(*(llm.beam_search(prompt, params) for prompt in prompts))
        assert [output.outputs for output in found] == [output.outputs for output in offline]
        endless = BeamSearchParams(beam_width=3, max_tokens=100, ignore_eos=True)
        searching = asyncio.create_task(llm.beam_search([1, 2, 3], endless))
        while not (await llm.stats()).running:
            await asyncio.sleep(0)
        assert not await llm.reset_prefix_cache()
        searching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await searching
        await assert_nothing_held(llm)
        assert (await llm.stats()).blocks_cached > 0
        assert await llm.reset_prefix_cache()
        assert (await llm.stats()).blocks_cached == 0
        with pytest.raises(TypeError, match="expected SamplingParams or None"):
            llm.generate("a", params)  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="BeamSearchParams"):
            await llm.beam_search("a", SamplingParams())  # pyright: ignore[reportArgumentType]

    run(tiny_model_dir, main)


def test_streams_interleave(tiny_model_dir: pathlib.Path):
    async def main(llm: AsyncLLM) -> None:
        order: list[str] = []

        async def read(prompt: str) -> None:
            params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
            stream = llm.generate(prompt, params)
            while await anext(stream, None) is not None:
                order.append(prompt)

        await asyncio.gather(read("the fox"), read("a dog"), read("keys"))
        first_end = min(len(order) - order[::-1].index(who) for who in order)
        assert set(order[:first_end]) == {"the fox", "a dog", "keys"}

    run(tiny_model_dir, main)


def test_a_slow_reader_gets_the_newest_output(tiny_model_dir: pathlib.Path):
    async def main(llm: AsyncLLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        lengths = []
        async for output in llm.generate([4, 5, 6], params):
            lengths.append(len(output.outputs[0].token_ids))
            while (await llm.stats()).running:
                await asyncio.sleep(0.002)
        assert lengths[-1] == 30
        assert len(lengths) <= 3

    run(tiny_model_dir, main)


def test_closing_a_stream_early_frees_its_blocks(tiny_model_dir: pathlib.Path):
    async def main(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=150, ignore_eos=True)
        async with contextlib.aclosing(llm.generate([1, 3, 5], params)) as stream:
            async for _ in stream:
                break
        await assert_nothing_held(llm)

    run(tiny_model_dir, main)


BAD_INPUT: list[tuple[Any, Any, type[Exception], str]] = [
    ("", None, ValueError, "prompt is empty"),
    ([3, 100_000], None, ValueError, "outside the vocabulary"),
    ([5] * 192, None, ValueError, "max_model_len"),
    (7, None, TypeError, "a prompt is text or a list of token ids"),
    ("a", {"max_tokens": 3}, TypeError, "SamplingParams"),
    ("a", 3, TypeError, "expected SamplingParams or None, got int"),
    ("a", [SamplingParams()], TypeError, "expected SamplingParams or None, got list"),
    (None, None, TypeError, "got NoneType"),
    (["a"], None, TypeError, "which are integers; got 'a'"),
    ("a\ud800", None, ValueError, "lone surrogate"),
    ("a", SamplingParams(bad_words=[[400]]), ValueError, "outside the vocabulary"),
]


def test_bad_input_raises_in_the_task_that_brought_it(tiny_model_dir: pathlib.Path):
    async def main(llm: AsyncLLM) -> None:
        async def read(prompt: Any, params: Any) -> int:
            outputs = [output async for output in llm.generate(prompt, params)]
            return len(outputs[-1].outputs[0].token_ids)

        good = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        bad = [read(prompt, params) for prompt, params, _, _ in BAD_INPUT]
        fine, *refused = await asyncio.gather(read("the fox", good), *bad, return_exceptions=True)
        for got, (_, _, kind, words) in zip(refused, BAD_INPUT, strict=True):
            assert isinstance(got, kind)
            assert words in str(got)
        assert fine == 9
        await assert_nothing_held(llm)

    run(tiny_model_dir, main)


def test_a_request_of_the_engine_s_own_is_no_stream_s(tiny_model_dir: pathlib.Path):
    async def main(llm: AsyncLLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        for request_id in ("0", "2"):
            await llm._ask(
                lambda name: inner(llm).submit("a fox", params, request_id=name), request_id
            )

        async def read(params: SamplingParams) -> int:
            outputs = [output async for output in llm.generate([3, 4], params)]
            return len(outputs[-1].outputs[0].token_ids)

        async def close_early() -> None:
            async with contextlib.aclosing(llm.generate([3, 4], params)) as stream:
                await anext(stream)

        short = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        *lengths, _ = await asyncio.gather(*(read(short) for _ in range(3)), close_early())
        assert lengths == [9] * 3
        while (stats := await llm.stats()).running:
            await asyncio.sleep(0.002)
        assert stats.generated_tokens >= 2 * 40 + 3 * 9
        await assert_nothing_held(llm)

    run(tiny_model_dir, main)


def test_an_unknown_option_is_a_type_error_before_anything_loads():
    with pytest.raises(TypeError, match="unknown options \\['blocksize'\\]"):
        AsyncLLM("no such model", blocksize=16)


def test_a_model_that_cannot_load_raises_where_it_is_awaited_and_leaves_no_thread(
    tmp_path: pathlib.Path,
):
    async def main() -> None:
        with pytest.raises(ValueError, match=r"config\.json"):
            async with AsyncLLM(tmp_path):
                pass

    asyncio.run(main())
    assert_no_engine_thread()


def test_streams_of_a_lower_priority_run_first_and_a_full_queue_refuses(
    tiny_model_dir: pathlib.Path,
):
    ended: list[int] = []

    async def main() -> None:
        async with AsyncLLM(
            tiny_model_dir, **LLM_OPTIONS | {"max_num_seqs": 1, "max_waiting": 3}
        ) as llm:

            async def read(priority: Any) -> None:
                params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
                async for _ in llm.generate([4, 5, 6], params, priority=priority):
                    pass
                ended.append(priority)

            # The engine's thread waits until all have asked: none runs before the others wait.
            gate = threading.Event()
            llm._thread.submit(gate.wait)
            tasks = [asyncio.create_task(read(priority)) for priority in (5, "5", -1, 2, 0)]
            for _ in range(10):
                await asyncio.sleep(0)
            gate.set()
            _, bad, _, _, late = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(bad, TypeError)
            assert isinstance(late, QueueFullError)

    asyncio.run(main())
    assert ended == [-1, 2, 5]


def test_a_failed_request_raises_with_what_it_has(tiny_model_dir: pathlib.Path):
    async def main(llm: AsyncLLM) -> None:
        engine = inner(llm).engine
        run_step = engine.runner.run
        num_runs = 0

        def failing(plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
            nonlocal num_runs
            num_runs += 1
            if num_runs in (4, 5):
                raise OSError("no luck")
            return run_step(plan, outputs)

        engine.runner.run = failing
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        with pytest.raises(EngineFailedError, match="no luck") as caught:
            async for _ in llm.generate([3, 4, 5], params):
                pass
        # The third one's step was in flight when the fourth failed.
        assert len(caught.value.outputs[0].outputs[0].token_ids) == 2
        assert caught.value.outputs[0].outputs[0].finish_reason == "error"
        again = [output async for output in llm.generate([3, 4, 5], params)]
        assert len(again[-1].outputs[0].token_ids) == 20
        await assert_nothing_held(llm)

    run(tiny_model_dir, main)


def test_an_engine_that_raises_ends_the_streams_instead_of_hanging(tiny_model_dir: pathlib.Path):
    async def main(llm: AsyncLLM) -> None:
        scheduler = inner(llm).engine.scheduler
        schedule = scheduler.schedule

        def failing() -> Any:
            scheduler.schedule = schedule
            raise AssertionError("a broken invariant")

        scheduler.schedule = failing
        with pytest.raises(EngineFailedError, match="a broken invariant"):
            await anext(llm.generate([3, 4, 5]))
        await assert_nothing_held(llm)

    run(tiny_model_dir, main)


def test_closing_while_streams_run_ends_them_with_an_error(tiny_model_dir: pathlib.Path):
    async def main() -> None:
        llm = AsyncLLM(tiny_model_dir, **LLM_OPTIONS)
        started = asyncio.Event()

        async def read() -> None:
            params = SamplingParams(max_tokens=150, ignore_eos=True)
            async for _ in llm.generate([1, 2, 3], params):
                started.set()

        tasks = [asyncio.create_task(read()) for _ in range(11)]  # three of them still wait
        await started.wait()
        await asyncio.gather(llm.close(), llm.aclose())
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineFailedError) for result in results)
        with pytest.raises(RuntimeError, match="closed"):
            await anext(llm.generate("late"))
        with pytest.raises(RuntimeError, match="closed"):
            await llm.stats()

    asyncio.run(main())
    assert_no_engine_thread()


def test_an_idle_engine_runs_no_steps(tiny_model_dir: pathlib.Path):
    async def main(llm: AsyncLLM) -> None:
        async for _ in llm.generate([1, 2, 3], SamplingParams(max_tokens=4)):
            pass
        await llm.stats()
        steps = 0
        engine_step = inner(llm).engine.step

        def counting() -> Any:
            nonlocal steps
            steps += 1
            return engine_step()

        inner(llm).engine.step = counting
        await asyncio.sleep(0.05)
        assert steps == 0

    run(tiny_model_dir, main)


def test_a_loop_that_ends_without_close_leaves_an_engine_that_stops(tiny_model_dir: pathlib.Path):
    llm = AsyncLLM(tiny_model_dir, **LLM_OPTIONS)

    async def main() -> None:
        params = SamplingParams(max_tokens=180, ignore_eos=True)
        stream = llm.generate([1, 2, 3], params)
        await anext(stream)
        stream_tasks.append(stream)  # keeps it from being closed here

    stream_tasks: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()

    async def close() -> None:
        await llm.close()

    asyncio.run(close())
    assert_no_engine_thread()


def run(directory: pathlib.Path, main: Callable[[AsyncLLM], Coroutine[Any, Any, None]]) -> None:
    """Runs `main` with an engine over a small pool, and sees the engine gone after it."""

    async def with_engine() -> None:
        async with AsyncLLM(directory, **LLM_OPTIONS) as llm:
            await main(llm)

    asyncio.run(with_engine())
    assert_no_engine_thread()


async def assert_nothing_held(llm: AsyncLLM) -> None:
    stats = await llm.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    check(inner(llm).engine.scheduler)


def inner(llm: AsyncLLM) -> LLM:
    assert llm._llm is not None, "the tests look inside only while it is open"
    return llm._llm


def assert_no_engine_thread() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("jpaged-engine"):
            thread.join(timeout=5)  # it may be on its last instructions
            assert not thread.is_alive()
