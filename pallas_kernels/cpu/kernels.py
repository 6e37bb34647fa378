"""What the `cpu` backend always needs compiled, side by side."""

from concurrent.futures import ThreadPoolExecutor

from pallas_kernels.cpu import attention, pool


def prepare() -> None:
    """Compiles what a float32 pool needs, and registers it. Raises BuildError.

    The rest is compiled when it is first traced: attention over pools of other dtypes, and the
    product of one row.
    """
    with ThreadPoolExecutor() as threads:
        jobs = [
            threads.submit(attention.register, "float32"),
            threads.submit(pool.register),
        ]
    for job in jobs:
        job.result()
