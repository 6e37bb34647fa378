"""One load of a model's weights in this process; `benchmarks.load_memory` runs and watches it."""

import contextlib
import json
import sys

import jax
import orbax.checkpoint  # noqa: F401 - imported when first used, which is not what is measured

from jpaged_models import load_decoder, open_checkpoint, params_of


def main(model: str | None, dtype: str) -> None:
    """Starts JAX, waits for a line, loads, and says how many bytes that was."""
    jax.block_until_ready(jax.device_put(0))
    print("ready", flush=True)
    sys.stdin.readline()
    with contextlib.closing(open_checkpoint(model)) as checkpoint:
        leaves = jax.tree.leaves(params_of(load_decoder(checkpoint, dtype=dtype)))
    jax.block_until_ready(leaves)
    form = type(checkpoint).__name__.removesuffix("Checkpoint")
    told = {"form": form, "weights_bytes": sum(leaf.nbytes for leaf in leaves)}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
