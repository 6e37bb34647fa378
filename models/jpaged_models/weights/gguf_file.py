"""The GGUF container: metadata and a table of tensors over one memory-mapped file."""

import dataclasses
import math
import pathlib
import struct
from typing import Any

import gguf
import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # the format's, where general.alignment is silent
MAX_DIMS = 4  # the format's
PIECE_BLOCKS = 4096  # dequantised at a time: half a megabyte, which stays in a core's cache
PLAIN_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies in the file."""

    shape: tuple[int, ...]  # NumPy's order, the last axis contiguous
    kind: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """A GGUF file whose header is read and whose every tensor is known to lie inside it.

    gguf's own reader takes seconds for a large vocabulary and reads past the end of a cut file.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; download it again")
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        try:
            self.metadata, self.tensors = _read_header(self._data.data)
        except (ValueError, struct.error) as error:
            raise ValueError(
                f"{path} is not a whole GGUF file ({error}); download it again"
            ) from error

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, a view of the file where it is stored as that."""
        info = self.tensors[name]
        raw = np.asarray(self._data[info.offset : info.offset + info.num_bytes])
        if info.kind.name == "F32":
            return raw.view("<f4").reshape(info.shape)
        if info.kind.name == "F16":
            return raw.view("<f2").reshape(info.shape).astype(np.float32)
        return _dequantized(raw, info.kind).reshape(info.shape)


def _dequantized(raw: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The numbers of a tensor's bytes, piece by piece.

    gguf takes rows, sixteen at a time: a small model's are so short that calls take most of it.
    """
    num_numbers, num_bytes = gguf.GGML_QUANT_SIZES[kind]  # of a block, which stands for itself
    pieces = range(0, raw.size, PIECE_BLOCKS * num_bytes)
    found = np.empty(raw.size // num_bytes * num_numbers, np.float32)
    for start in pieces:
        piece = gguf.dequantize(raw[start : start + pieces.step], kind)
        place = start // num_bytes * num_numbers
        found[place : place + piece.size] = piece
    return found


class _Cursor:
    """Reads the header's little-endian values one after the other."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.offset = 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.offset:
            raise ValueError(f"it ends inside its header, at byte {len(self.data)}")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def unpack(self, layout: str) -> Any:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))[0]

    def text(self) -> str:
        return str(self.take(self.unpack("Q")), "utf-8")


# GGUF's value types by number. Strings and arrays are read by hand.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"} | {
    12: "d"
}
_FLOAT32 = 6
_STRING = 8
_ARRAY = 9


def _read_header(data: memoryview) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    cursor = _Cursor(data)
    if bytes(cursor.take(4)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.unpack("I")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, of which only {VERSIONS} are read")
    num_tensors, num_values = cursor.unpack("Q"), cursor.unpack("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"it holds {key} twice")
        metadata[key] = _read_value(cursor, cursor.unpack("I"))
    entries = [_read_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in entries:
        tensor = GGUFTensor(shape, kind, start + offset, _num_bytes(name, shape, kind))
        if tensor.offset + tensor.num_bytes > len(data):
            raise ValueError(
                f"tensor {name!r} ends at byte {tensor.offset + tensor.num_bytes}, the file at "
                f"{len(data)}"
            )
        if name in tensors:
            raise ValueError(f"it holds tensor {name!r} twice")
        tensors[name] = tensor
    return metadata, tensors


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind == _FLOAT32:
        # 1e-5 was 1e-5 before it became a float32: the shortest spelling is the one meant.
        return float(str(np.float32(cursor.unpack("f"))))
    if kind in _SCALARS:
        return cursor.unpack(_SCALARS[kind])
    if kind != _ARRAY:
        raise ValueError(f"a metadata value has the unknown type {kind}")
    item_kind, length = cursor.unpack("I"), cursor.unpack("Q")
    if item_kind == _STRING:
        return [cursor.text() for _ in range(length)]
    if item_kind not in _SCALARS:
        raise ValueError(f"a metadata array has the unknown type {item_kind}")
    layout = np.dtype("<" + _SCALARS[item_kind])
    return np.frombuffer(cursor.take(length * layout.itemsize), layout).tolist()


def _read_tensor_entry(
    cursor: _Cursor,
) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    name = cursor.text()
    num_dims = cursor.unpack("I")
    if num_dims > MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {num_dims} dimensions")
    shape = tuple(cursor.unpack("Q") for _ in range(num_dims))[::-1]
    return name, shape, gguf.GGMLQuantizationType(cursor.unpack("I")), cursor.unpack("Q")


def _num_bytes(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block_size:
        raise ValueError(
            f"tensor {name!r} has rows of {shape[-1]}, not of whole {kind.name} blocks"
        )
    return math.prod(shape) // block_size * type_size
