"""The dtype of weights that nobody named, by what a device computes in."""

import types

import pytest

from jpaged import loading


@pytest.mark.parametrize(
    ("checkpoint", "device", "expected"),
    [
        ("bfloat16", {"platform": "cpu"}, "float32"),
        ("float16", {"platform": "tpu"}, "bfloat16"),
        ("bfloat16", {"platform": "tpu"}, "bfloat16"),
        ("float32", {"platform": "tpu"}, "float32"),
        ("float16", {"platform": "gpu", "compute_capability": "9.0"}, "float16"),
        ("bfloat16", {"platform": "gpu", "compute_capability": "8.0"}, "bfloat16"),
        ("bfloat16", {"platform": "gpu", "compute_capability": "7.5"}, "float16"),
    ],
)
def test_a_device_gets_a_dtype_that_it_computes_in(checkpoint: str, device: dict, expected: str):
    found = loading._weights_dtype("auto", checkpoint, types.SimpleNamespace(**device))  # pyright: ignore[reportArgumentType]
    assert found == expected
