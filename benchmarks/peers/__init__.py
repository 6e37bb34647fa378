"""Other engines beside jpaged: a small adapter for each, run by the interpreter that has it.

An adapter imports nothing of ours but `worker` and `others`, which need the standard library only.
"""

PEERS = ("vllm", "openvino", "transformers", "llama.cpp")


def module_of(side: str) -> str:
    """The module whose process is the side's: of a peer, or of jpaged itself."""
    return f"benchmarks.peers.{side.replace('.', '_')}_side"
