"""One start of jpaged in this process, timed; prints a JSON line. `benchmarks.startup` runs it.

It imports nothing before the clock runs that jax or jpaged would import.
"""

import json
import sys
import time

from benchmarks.process_memory import memory_bytes


def main(options: dict) -> None:
    """Imports, loads, answers with one token, and says how long each took, in seconds."""
    start = time.perf_counter()
    import jax

    imported_jax = time.perf_counter()
    import jpaged

    imported = time.perf_counter()
    params = jpaged.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    llm = jpaged.LLM(**options, use_tqdm=False)
    loaded = time.perf_counter()
    (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    told = time.perf_counter()
    assert len(output.outputs[0].token_ids) == 1, "one token was asked for"
    runner, stats = llm.engine.runner, llm.stats()
    figures = {
        "import_jax_s": imported_jax - start,
        "import_jpaged_s": imported - imported_jax,
        "load_s": loaded - imported,
        "first_token_s": told - loaded,
        "load_to_first_token_s": told - imported,
        "start_to_first_token_s": told - start,
        "programs": stats.compiles,
        "lazy_compiles": stats.lazy_compiles,
        "weights_bytes": sum(leaf.nbytes for leaf in runner.params),
        "pool_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(runner.pool)),
        "peak_rss_bytes": memory_bytes("VmHWM"),
        "model": llm.model_source,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
