"""Whether `mosaic-gpu` is right, where `pallas-gpu` is under test: its cases, then its tokens.

A part of its own: no GPU had run these kernels when it was made, and what hangs or breaks the
device's context here harms no other part.
"""

from benchmarks.gpu import correctness, parity
from benchmarks.gpu.beside import second_backend
from benchmarks.gpu.settings import Record, Settings


def run(settings: Settings, record: Record) -> None:
    """Records its cases, then its parity."""
    backend = second_backend(settings, record)
    if backend is None:
        if not record.results:
            reason = f"{settings.backend} brings no other backend with it"
            record("mosaic-gpu", {"ok": True, "error": reason})
        return
    correctness.check_attention(backend, settings, record)
    parity.check_tokens(backend, settings, record)
