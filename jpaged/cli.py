"""The command line: what each command does with the options that it was given."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

from jpaged.cli_options import parse
from jpaged.errors import JpagedError
from jpaged.outputs import RequestOutput
from jpaged.params import SamplingParams

if TYPE_CHECKING:
    from jpaged.llm import LLM

# Each with the most tokens its answer may have: they differ, so that rows end and others go on.
DEMO_QUESTIONS = (
    ("What is the capital of France?", 24),
    ("Write two sentences about the sea.", 64),
    ("Give me three tips for a good night's sleep.", 48),
    ("What is photosynthesis?", 96),
    ("Write a Python function that adds two numbers.", 40),
    ("Describe the city of Rome in one paragraph.", 96),
    ("Explain to a child what a computer program is.", 80),
    ("Summarize the story of Cinderella in three sentences.", 64),
)

_LLM_OPTIONS = (
    "model",
    "revision",
    "dtype",
    "block_size",
    "num_blocks",
    "memory_fraction",
    "swap_space",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "max_waiting",
    "enable_prefix_caching",
    "async_scheduling",
    "attention_backend",
)


def main(arguments: SequenceOf[str] | None = None) -> int:
    """Runs one command; its exit status."""
    args = parse(arguments)
    try:
        _COMMANDS[args.command](args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, RuntimeError, JpagedError) as error:
        print(f"jpaged: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _generate(args: argparse.Namespace) -> None:
    prompts = _prompts(args)
    params = _params(args)
    if args.system is not None and not args.chat:
        raise ValueError("--system is a message of a conversation, so it needs --chat")
    if args.logprobs is not None and not args.json:
        raise ValueError("--logprobs are shown by --json alone; give both")
    if args.stream and (len(prompts) > 1 or params.n > 1):
        raise ValueError(
            f"--stream shows one answer, got {len(prompts)} prompts and n={params.n}; leave it out"
        )
    # One sequence needs two programs or three: it starts sooner if the others are not compiled.
    with _open_llm(args, warm_up=len(prompts) * params.n > 1) as llm:
        start = time.perf_counter()
        if args.stream:
            _print_stream(args, llm, prompts[0], params)
        else:
            outputs = _run(args, llm, prompts, params)
            for prompt, output in zip(prompts, outputs, strict=True):
                _print_output(args, prompt, output, many=len(prompts) > 1)
        if args.stats:
            print(_figures(llm, len(prompts), time.perf_counter() - start), file=sys.stderr)


def _demo(args: argparse.Namespace) -> None:
    most = args.max_tokens
    limits = [limit if most is None else min(limit, most) for _, limit in DEMO_QUESTIONS]
    params = [SamplingParams(temperature=0, max_tokens=limit) for limit in limits]
    questions = [question for question, _ in DEMO_QUESTIONS]
    with _open_llm(args, warm_up=True) as llm:
        start = time.perf_counter()
        if _has_template(llm):
            messages = [[{"role": "user", "content": question}] for question in questions]
            outputs = llm.chat(messages, params, use_tqdm=True)
        else:
            outputs = llm.generate(questions, params, use_tqdm=True)
        seconds = time.perf_counter() - start
        for question, output in zip(questions, outputs, strict=True):
            print(f"> {question}\n{output.text.strip()}\n")
        print(_figures(llm, len(outputs), seconds))
        print(f"model: {llm.model_source}")


def _warm_up(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    with _open_llm(args, warm_up=True) as llm:
        import jax

        seconds = time.perf_counter() - start
        folder = jax.config.values["jax_compilation_cache_dir"]
        print(
            f"{llm.model_source}: {llm.stats().compiles} programs in {seconds:.1f} s, loading "
            "included; " + (f"kept in {folder}" if folder else "kept nowhere")
        )


def _convert(args: argparse.Namespace) -> None:
    from jpaged.convert import convert

    start = time.perf_counter()
    options = _given(args, ["dtype", "revision"])
    done = convert(args.source, args.directory, **options)
    print(
        f"{done.source}: {done.num_parameters:,} parameters in {done.dtype}, written to "
        f"{args.directory} in {time.perf_counter() - start:.1f} s"
    )


def _chat(args: argparse.Namespace) -> None:
    from jpaged import chat

    params = _params(args)
    chat.check_model(args.model, revision=args.revision)  # before anything takes its time
    with _open_llm(args, warm_up=False) as llm:
        chat.run(chat.Chat(llm, params, args.system))


def _top(args: argparse.Namespace) -> None:
    from jpaged import top, top_load

    for name in ("rounds", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    lines = None if args.prompts_file is None else _prompts(args)
    with _open_llm(args, warm_up=False) as llm:
        limits = llm.engine.scheduler.config
        if lines is None:
            questions = top_load.demo_questions(llm, [question for question, _ in DEMO_QUESTIONS])
            rounds, max_answers = args.rounds, min(max(top_load.NUM_ANSWERS), limits.max_waiting)
        else:
            questions = [top_load.Question(line, line) for line in lines]
            rounds, max_answers = args.rounds or 1, 1
        top_load.check(llm, questions, max_tokens=args.max_tokens)
        llm.engine.runner.warm_up(progress=True)  # not before that: it takes its time
        top.run(
            llm,
            top_load.load_of(
                questions, max_tokens=args.max_tokens, rounds=rounds, max_answers=max_answers
            ),
            at_once=min(2 * limits.max_num_seqs, limits.max_waiting // max_answers),
        )


_COMMANDS = {
    "generate": _generate,
    "chat": _chat,
    "demo": _demo,
    "top": _top,
    "warmup": _warm_up,
    "convert": _convert,
}


def _prompts(args: argparse.Namespace) -> list[str]:
    lines: list[str] = []
    if args.prompts_file == "-":
        lines = sys.stdin.read().splitlines()
    elif args.prompts_file is not None:
        lines = _read(pathlib.Path(args.prompts_file)).splitlines()
    prompts = [*args.prompts, *(line for line in lines if line.strip())]
    if not prompts:
        raise ValueError("there is no prompt; give a PROMPT, or a --prompts-file that has a line")
    if not all(prompts):
        raise ValueError("a prompt is empty; expected text")
    return prompts


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read --prompts-file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error


def _params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(**_given(args, [f.name for f in dataclasses.fields(SamplingParams)]))


def _given(args: argparse.Namespace, names: SequenceOf[str]) -> dict[str, Any]:
    """The options that were given: for the others the API's own defaults hold."""
    values = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _open_llm(args: argparse.Namespace, *, warm_up: bool) -> "LLM":
    # Here and not above: --help and a mistyped option should not wait for JAX.
    from jpaged.llm import LLM

    quiet = getattr(args, "quiet", False)
    # What loading has to say goes to stderr; an error is raised, and told there all the same.
    with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
        return LLM(**_given(args, _LLM_OPTIONS), warm_up=warm_up, use_tqdm=not quiet)


def _run(
    args: argparse.Namespace, llm: "LLM", prompts: list[str], params: SamplingParams
) -> list[RequestOutput]:
    progress = not args.quiet
    if not args.chat:
        return llm.generate(prompts, params, use_tqdm=progress)
    return llm.chat([_messages(args, p) for p in prompts], params, use_tqdm=progress)


def _messages(args: argparse.Namespace, prompt: str) -> list[dict[str, str]]:
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": prompt}]


def _print_stream(
    args: argparse.Namespace, llm: "LLM", prompt: str, params: SamplingParams
) -> None:
    start: str | list[int] = prompt
    if args.chat:
        if llm.tokenizer is None or llm.tokenizer.chat_template is None:
            raise ValueError(f"{llm.model_source} has no chat template; leave out --chat")
        start = llm.tokenizer.apply_chat_template(_messages(args, prompt))
    for delta in llm.stream(start, params):
        print(delta.text, end="", flush=True)
    print()


def _print_output(
    args: argparse.Namespace, prompt: str, output: RequestOutput, *, many: bool
) -> None:
    if args.json:
        print(json.dumps(dataclasses.asdict(output), ensure_ascii=False))
        return
    if many:
        print(f"> {prompt}")
    for completion in output.outputs:
        label = f"[{completion.index + 1}] " if len(output.outputs) > 1 else ""
        print(f"{label}{completion.text}")
    if many:
        print()


def _has_template(llm: "LLM") -> bool:
    return llm.tokenizer is not None and llm.tokenizer.chat_template is not None


def _figures(llm: "LLM", num_requests: int, seconds: float) -> str:
    """One line: what was done, how fast, and how well the blocks were used."""
    stats = llm.stats()
    return (
        f"requests: {num_requests}; tokens: {stats.generated_tokens} in {seconds:.1f} s "
        f"({stats.generated_tokens / seconds:.1f} tokens/s); "
        f"peak blocks: {stats.peak_blocks} of {stats.num_blocks - 1}; "
        f"waste: {100 * stats.mean_waste:.1f} %; "
        f"compiles: {stats.compiles} ({stats.lazy_compiles} while requests waited)"
    )


if __name__ == "__main__":
    sys.exit(main())
