"""What the optimised HLO of a TPU program says about the pool."""

import re


def check_pool_stays(hlo: str, shape: tuple[int, ...]) -> None:
    """The pool is an argument, and nothing makes another array of its shape."""
    pool = rf"\w+\[{','.join(map(str, shape))}\]\S*"
    assert re.search(rf" = {pool} parameter\(", hlo)
    assert not re.search(rf" = \(?{pool} (copy|copy-start|transpose|convert)\b", hlo)
