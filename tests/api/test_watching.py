"""Looking at an engine while it works: traces and pictures through the public API."""

import asyncio
import pathlib

import pytest

import jpaged
from jpaged import LLM, AsyncLLM, SamplingParams, Stats
from jpaged.picture import Picture
from jpaged.trace import StepRecord
from tests.helpers import LLM_OPTIONS

PARAMS = SamplingParams(temperature=0, max_tokens=11, ignore_eos=True)


def assert_adds_up(steps: list[StepRecord], before: Stats, after: Stats) -> None:
    assert len(steps) == after.steps - before.steps
    for name, counted in {
        "generated_tokens": after.generated_tokens - before.generated_tokens,
        "tokens": after.computed_tokens - before.computed_tokens,
        "preemptions": after.preemptions - before.preemptions,
        "copied_blocks": after.copied_blocks - before.copied_blocks,
    }.items():
        assert sum(record[name] for record in steps) == counted, name
    assert len({tuple(record) for record in steps}) == 1  # the same columns for a table
    for record in steps:
        assert 0 < record["seconds"] <= record["time"]


def test_a_trace_follows_generate_stream_and_step(tiny_model_dir: pathlib.Path):
    with LLM(tiny_model_dir, **LLM_OPTIONS) as llm:
        llm.generate("the fox", PARAMS, use_tqdm=False)
        before = llm.stats()
        with llm.trace() as steps:
            llm.generate(["the lazy dog", "the lazy dog and"], PARAMS, use_tqdm=False)
            num_generate = len(steps)
            for _ in llm.stream("a block holds", PARAMS):
                pass
            num_stream = len(steps) - num_generate
            llm.submit("keys", PARAMS)
            while llm.has_unfinished_requests:
                llm.step()
        assert num_generate >= 11
        assert num_stream == 11
        assert_adds_up(steps, before, llm.stats())
        num_steps = len(steps)
        llm.generate("values", PARAMS, use_tqdm=False)
        assert len(steps) == num_steps


def test_a_failing_block_ends_its_trace(tiny_model_dir: pathlib.Path):
    with LLM(tiny_model_dir, **LLM_OPTIONS) as llm:
        with pytest.raises(ZeroDivisionError), llm.trace() as steps:
            _ = 1 / 0
        llm.generate("the fox", PARAMS, use_tqdm=False)
        assert steps == []


def test_a_picture_between_steps_shows_the_prompt_and_the_answer(tiny_model_dir: pathlib.Path):
    with LLM(tiny_model_dir, **LLM_OPTIONS) as llm:
        stream = llm.stream("the quick brown fox", PARAMS)
        text = "".join(next(stream).text for _ in range(6))
        picture = jpaged.show(llm)
        assert picture.snapshot == llm.snapshot()
        (table,) = picture.snapshot.tables
        assert (table.prompt, table.text) == ("the quick brown fox", text)
        assert "the quick brown fox" in picture._repr_html_()
        del stream  # nobody reads on: the request is aborted
        assert "0 sequences running" in str(jpaged.show(llm))
        assert len(picture.snapshot.tables) == 1


def test_an_async_engine_is_watched_while_it_runs(tiny_model_dir: pathlib.Path):
    async def main() -> None:
        async with AsyncLLM(tiny_model_dir, **LLM_OPTIONS) as llm:
            before = await llm.stats()

            async def read(prompt: str) -> list[Picture]:
                return [await jpaged.show(llm) async for _ in llm.generate(prompt, PARAMS)]

            with llm.trace() as steps:
                read_by_each = await asyncio.gather(*map(read, ["the fox", "a dog", "keys"]))
                after = await llm.stats()
            pictures = [picture for read_by_one in read_by_each for picture in read_by_one]
            assert_adds_up(steps, before, after)
            assert max(len(picture.snapshot.tables) for picture in pictures) > 1
            for picture in pictures:
                for block in picture.snapshot.blocks:
                    assert len(block.owners) == block.ref_count

    asyncio.run(main())


def test_an_async_engine_that_is_not_open_has_no_trace(tiny_model_dir: pathlib.Path):
    llm = AsyncLLM(tiny_model_dir, **LLM_OPTIONS)
    with pytest.raises(RuntimeError, match="not open"):
        llm.trace()
    asyncio.run(llm.close())
