"""What `jpaged top` generates while it draws."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jpaged import marks
from jpaged.llm import LLM
from jpaged.params import SamplingParams
from jpaged.prompts import Prompt

# What the demo's prompts begin with: some blocks that all of them share.
OPENING = (
    "You answer the visitors of a small library by the sea. Be friendly and plain, keep to what "
    "was asked, and write whole sentences. Where you do not know something, say so instead of "
    "guessing. Explain every word that a child of ten would not know, and end with the title of "
    "a book in which the visitor can read more."
)
NUM_ANSWERS = (1, 3, 1, 2)  # that the demo's requests ask for, in turn
NUM_LENGTHS = 7  # of answers, in turn, so that rows end and others start


class Question(NamedTuple):
    """A prompt, and what is shown of it before its answer."""

    title: str
    prompt: Prompt


Load = Iterator[tuple[Question, SamplingParams]]


def demo_questions(llm: LLM, texts: Sequence[str]) -> list[Question]:
    """The questions behind one opening, by the model's chat template where it has one."""
    tokenizer = llm.tokenizer
    prompts: list[Prompt] = [f"{OPENING}\n\n{text}\n" for text in texts]
    if tokenizer is not None and tokenizer.chat_template is not None:
        # All of it in the user's words: some templates refuse a system message.
        messages = [{"role": "user", "content": prompt} for prompt in prompts]
        prompts = [tokenizer.apply_chat_template([message]) for message in messages]
    return [Question(f"{text} ", prompt) for text, prompt in zip(texts, prompts, strict=True)]


def load_of(
    questions: Sequence[Question], *, max_tokens: int, rounds: int | None, max_answers: int
) -> Load:
    """All questions so many times, or without end, and how each is to be answered."""
    every = itertools.repeat(questions, *(() if rounds is None else (rounds,)))
    for i, question in enumerate(itertools.chain.from_iterable(every)):
        yield (
            question,
            SamplingParams(
                n=min(NUM_ANSWERS[i % len(NUM_ANSWERS)], max_answers),
                max_tokens=max(1, max_tokens * (i % NUM_LENGTHS + 1) // NUM_LENGTHS),
            ),
        )


def check(llm: LLM, questions: Sequence[Question], *, max_tokens: int) -> None:
    """Raises ValueError for a question that could never be answered."""
    params = SamplingParams(max_tokens=max_tokens)
    for question in questions:
        try:
            llm.stream(question.prompt, params)  # adds nothing before it is asked for a piece
        except ValueError as error:
            raise ValueError(f"{marks.shortened(question.title.strip(), 40)!r}: {error}") from error
