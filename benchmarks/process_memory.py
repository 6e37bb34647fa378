"""How much memory a process has, as Linux tells it. Standard library only: peers import it too."""

import pathlib


def memory_bytes(kind: str, process_id: int | None = None) -> int | None:
    """A process's memory of one kind, its own where no other is named.

    Args:
        kind: VmHWM is the peak of all of it (`getrusage` counts its parent's too), RssAnon what is
            no mapped file.
        process_id: another process.

    Returns:
        None where the system does not tell, or the process has ended.
    """
    try:
        status = pathlib.Path(f"/proc/{process_id or 'self'}/status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields[kind].split()[0]) * 1024 if kind in fields else None
