"""What the command line takes: the commands and the options of each."""

import argparse
from collections.abc import Sequence as SequenceOf
from typing import Any

import jpaged

MAX_TOKENS = 128  # the API's 16 is for a caller who looks at the first words only
CHAT_MAX_TOKENS = 512

_SOURCE_HELP = (
    "a directory in Hugging Face's layout or of `jpaged convert`, a .gguf file, a hub id, or "
    "tiny, a small model that comes along"
)
_MODEL_HELP = f"{_SOURCE_HELP} (by default SmolLM2-135M-Instruct)"

_EXAMPLES = """\
examples:
  jpaged generate "Once upon a time" --temperature 0
  jpaged generate --chat "Why is the sky blue?" --stream --max-tokens 200
  jpaged generate "A cat" "A dog" --n 3 --seed 7 --stop . --stop '!'
  jpaged generate --prompts-file questions.txt --chat --json > answers.jsonl
  jpaged generate "The sea" --model models/llama --dtype bfloat16 --stats
  cat prompts.txt | jpaged generate --prompts-file - --max-num-seqs 8

Generated text goes to stdout, everything else to stderr. Exit status: 0 when all went well,
2 for a bad option, prompt or model (stderr says which), 130 after Ctrl-C.
"""


def parse(arguments: SequenceOf[str] | None) -> argparse.Namespace:
    """The options of one command, whose name is `command`; exits where one is unknown."""
    args, unknown = _parser().parse_known_args(arguments)
    if unknown:  # told by the command's own parser: the outer one would show no option of it
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jpaged",
        description="Text from language models over a paged KV cache, on a TPU, a GPU or a CPU.",
        epilog="`jpaged COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"jpaged {jpaged.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    generate = commands.add_parser(
        "generate",
        usage="%(prog)s [PROMPT ...] [options]",
        help="continue prompts, or answer messages",
        description="Continues one prompt or many; all of them are generated together.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_input(generate)
    _add_sampling(generate)
    _add_output(generate)
    _add_model(generate)
    _add_engine(generate)
    generate.set_defaults(parser=generate)
    demo = commands.add_parser(
        "demo",
        help="answer several questions at once and show the figures",
        description="Answers a few questions at once, greedily, and prints the engine's figures.",
        allow_abbrev=False,
    )
    _add_model(demo)
    demo.add_argument(
        "--max-tokens", type=int, metavar="N", help="at most so many tokens an answer"
    )
    demo.set_defaults(parser=demo)
    warmup = commands.add_parser(
        "warmup",
        help="compile a model's programs ahead, into the cache",
        description="Compiles what a model's engine will run and keeps it, so that the next start "
        "with the same options finds it: programs depend on the model's shapes, on most options "
        "below, on the device and on the versions of JAX and jpaged.",
        allow_abbrev=False,
    )
    warmup.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL_HELP)
    _add_revision(warmup)
    _add_engine(warmup)
    warmup.set_defaults(parser=warmup)
    _add_chat(commands)
    _add_top(commands)
    _add_convert(commands)
    return parser


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk with a model in the terminal",
        description="A conversation: answers appear as they are written. Ctrl-C stops an answer "
        "or clears the line, Ctrl-D ends it all; /help tells the rest. What no longer fits the "
        "model's context is forgotten, the oldest first.",
        allow_abbrev=False,
    )
    chat.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL_HELP)
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    _add_sampling(chat, max_tokens=CHAT_MAX_TOKENS)
    _add_revision(chat)
    # A conversation is one sequence: they have no say, and the pool needs room for one context.
    _add_engine(chat, without=("--swap-space", "--max-num-seqs", "--max-waiting"))
    chat.set_defaults(parser=chat, max_num_seqs=1)


def _add_top(commands: Any) -> None:
    top = commands.add_parser(
        "top",
        help="watch the pool while prompts are generated",
        description="Draws the pool of blocks live. A bar is a block in use: its height is what it "
        "holds, its colour whose it is, underlined where several share it. ~ is kept for prompts "
        "that begin alike, · is empty, x takes what padding writes. Ctrl-C ends it.",
        allow_abbrev=False,
    )
    top.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="prompts, one a line; - reads stdin (its own questions)",
    )
    top.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="how often all prompts come (its own until Ctrl-C, a file's once)",
    )
    top.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        default=MAX_TOKENS,
        help=f"of the longest answer ({MAX_TOKENS})",
    )
    _add_model(top)
    _add_engine(top)
    top.set_defaults(parser=top, prompts=[])


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="keep a model as an Orbax checkpoint",
        description="Reads a model and writes it to a directory that every MODEL may name, as "
        "Orbax keeps it: parameters in the decoder's own layout, with config and tokenizer.",
        allow_abbrev=False,
    )
    convert.add_argument("source", nargs="?", metavar="SOURCE", help=_MODEL_HELP)
    convert.add_argument("directory", metavar="DEST", help="a directory that is not there yet")
    convert.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    convert.add_argument(
        "--dtype", metavar="DTYPE", help="of the parameters (the model's; bfloat16 if quantised)"
    )
    convert.set_defaults(parser=convert)


def _add_input(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input")
    group.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue")
    group.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="more prompts, one a line, empty lines skipped; - reads stdin",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is a user's message, written out by the model's own chat template",
    )
    group.add_argument("--system", metavar="TEXT", help="the system message, with --chat")


def _add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int = MAX_TOKENS) -> None:
    group = parser.add_argument_group("sampling")

    def add(flag: str, kind: type, metavar: str, text: str, default: Any = None) -> None:
        group.add_argument(flag, type=kind, metavar=metavar, help=text, default=default)

    add("--max-tokens", int, "N", f"at most so many tokens an answer ({max_tokens})", max_tokens)
    add("--min-tokens", int, "N", "no end before so many tokens (0)")
    add("--temperature", float, "X", "0 takes the likeliest token, higher is more random (1.0)")
    add("--top-k", int, "K", "only the K likeliest tokens (0: all)")
    add("--top-p", float, "P", "only the likeliest tokens that reach probability P together (1.0)")
    add("--min-p", float, "P", "only tokens at least P times as likely as the likeliest (0.0)")
    add("--seed", int, "N", "of the noise: the same seed gives the same text (drawn)")
    add("--presence-penalty", float, "X", "of tokens generated already, -2 to 2 (0)")
    add("--frequency-penalty", float, "X", "for each time one was, -2 to 2 (0)")
    add("--repetition-penalty", float, "X", "of tokens in prompt and answer, above 1 (1.0)")
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", default=None, help="go on after the model's end token"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")

    def add(flag: str, metavar: str, text: str) -> None:
        group.add_argument(flag, type=int, metavar=metavar, help=text)

    add("--n", "N", "answers a prompt (1)")
    add("--best-of", "N", "generate N answers a prompt, show the likeliest --n")
    add("--logprobs", "K", "log-probabilities of each token and the K likeliest; with --json")
    how = group.add_mutually_exclusive_group()
    how.add_argument(
        "--stream", action="store_true", help="print text as it comes (one prompt, --n 1)"
    )
    how.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a prompt and line, in the prompts' order",
    )
    group.add_argument("--stats", action="store_true", help="close with a line of figures")
    group.add_argument("--quiet", action="store_true", help="no progress and no notes on stderr")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help=_MODEL_HELP)
    _add_revision(group)


def _add_revision(group: argparse._ActionsContainer) -> None:
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    group.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="auto, float32, bfloat16 or float16 (auto: float32 on a CPU, else the model's)",
    )


def _add_engine(parser: argparse.ArgumentParser, *, without: SequenceOf[str] = ()) -> None:
    group = parser.add_argument_group("engine", "What is not given is chosen by device and memory.")

    def add(flag: str, kind: type, metavar: str, text: str) -> None:
        if flag not in without:
            group.add_argument(flag, type=kind, metavar=metavar, help=text)

    add("--block-size", int, "N", "token positions a block: a power of two from 8 to 128 (16)")
    add("--num-blocks", int, "N", "blocks in the pool")
    add("--memory-fraction", float, "X", "share of an accelerator's memory to use in all (0.9)")
    add("--swap-space", float, "GiB", "host memory for what preempted sequences computed (0)")
    add("--max-num-seqs", int, "N", "sequences that run at once (CPU 64, else 256)")
    add("--max-num-batched-tokens", int, "N", "tokens a step (CPU 256, else 2048)")
    add("--max-model-len", int, "N", "longest prompt and answer together")
    add("--max-waiting", int, "N", "sequences that may wait at most")
    group.add_argument(
        "--no-prefix-caching",
        dest="enable_prefix_caching",
        action="store_false",
        default=None,
        help="prompts that begin alike share nothing",
    )
    group.add_argument(
        "--no-async-scheduling",
        dest="async_scheduling",
        action="store_false",
        default=None,
        help="plan no step while another one runs",
    )
    add(
        "--attention-backend",
        str,
        "NAME",
        "auto, cpu, xla, reference, pallas-tpu, pallas-gpu or mosaic-gpu (auto)",
    )
