"""What the `cpu` backend needs compiled, all of it at once."""

from concurrent.futures import ThreadPoolExecutor

from pallas_kernels.cpu import attention, product, write


def prepare() -> None:
    """Compiles what a float32 pool needs, and registers it. Raises BuildError.

    Attention over a pool of another dtype is compiled when it is first traced.
    """
    with ThreadPoolExecutor() as threads:
        jobs = [
            threads.submit(attention.register, "float32"),
            threads.submit(write.register),
            threads.submit(product.register),
        ]
    for job in jobs:
        job.result()
