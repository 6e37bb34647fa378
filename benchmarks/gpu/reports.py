"""The results file: what was found by part and name, and of what.

An origin says of what a result is: commit, GPU, JAX, backend, scale, and the date. A part has the
origin of its latest run, and a result that an earlier run left there has its own. Results are of
the same where their origins are, but for the date. A part that is under way has a draft beside the
file, which is there still when both it and the command were killed.
"""

import json
import pathlib
import sys
from typing import Any

UNKNOWN = "unknown"  # a commit that is not even the same as itself
DRAFT = ".draft"


def read_report(path: pathlib.Path, head: dict[str, Any]) -> dict[str, Any]:
    """A report that begins with `head`, and has the parts of the file and of drafts beside it.

    Ends the command where the file is of another GPU.
    """
    report: dict[str, Any] = {**head, "parts": {}}
    if path.exists():
        old = json.loads(path.read_text())
        theirs, ours = old["machine"]["gpu"], head["machine"]["gpu"]
        if theirs != ours:
            sys.exit(f"{path} has results of {theirs}, this is {ours}: give --out another file")
        report["parts"] = {part: _with_origin(found, old) for part, found in old["parts"].items()}
    collect_drafts(path, report)
    return report


def write_report(path: pathlib.Path, report: dict[str, Any]) -> None:
    """The report in its file, with the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(report, indent=1) + "\n")


def write_whole(path: pathlib.Path, text: str) -> None:
    """The text in the file, which is whole at any moment."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def draft_path(path: pathlib.Path, part: str) -> pathlib.Path:
    """Where a part writes what it finds, for the results file `path`."""
    return path.with_name(f"{path.stem}.{part}{DRAFT}")


def take_draft(path: pathlib.Path) -> dict[str, Any] | None:
    """What a part has written, or None; it is in the caller's hands alone from now on."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    path.unlink()
    return found


def collect_drafts(path: pathlib.Path, report: dict[str, Any]) -> None:
    """Merges what parts had found when the command was killed."""
    for draft in sorted(path.parent.glob(f"{path.stem}.*{DRAFT}")):
        found = take_draft(draft)
        if found is not None:
            merge(report, found["part"], {"status": "cut short", **found})


def merge(report: dict[str, Any], part: str, found: dict[str, Any]) -> None:
    """Adds what a part has found: results of other names stay, each with its origin."""
    found.pop("running", None)
    older = report["parts"].get(part)
    kept = {}
    if older is not None:
        for name, result in older["results"].items():
            origin = origin_of(older, result)
            kept[name] = result if origin == found["origin"] else result | {"origin": origin}
    report["parts"][part] = found | {"results": kept | found["results"]}


def origin_of(found: dict[str, Any], result: dict[str, Any]) -> dict[str, str]:
    """Of what a part's result is."""
    return result.get("origin", found["origin"])


def is_same(origin: dict[str, str], other: dict[str, str]) -> bool:
    """Whether results are of the same commit, GPU, JAX, backend and scale."""
    undated, others = ({**one, "date": ""} for one in (origin, other))
    return undated == others and origin["commit"] != UNKNOWN


def results_of(found: dict[str, Any] | None, origin: dict[str, str]) -> dict[str, dict]:
    """A part's results that are of this run or of one of the same."""
    if found is None:
        return {}
    own = found["origin"] == origin  # even where the commit is unknown
    return {
        name: result
        for name, result in found["results"].items()
        if is_same(origin_of(found, result), origin) or (own and "origin" not in result)
    }


def _with_origin(found: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The part as it is written now, if it was written before there were origins."""
    if "origin" in found:
        return found
    settings = found.get("settings", {})
    origin = {
        "commit": found.get("commit", report["commit"]),
        "date": found.get("date", report["date"]),
        "gpu": report["machine"]["gpu"],
        "jax": found.get("versions", {}).get("jax", UNKNOWN),
        "backend": settings.get("backend", UNKNOWN),
        "scale": settings.get("scale", UNKNOWN),
    }
    return {"origin": origin, **found}
