"""The command that checks a GPU, with parts that pretend: what it keeps, leaves out and says."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.gpu import processes, reports
from benchmarks.gpu.table import part_lines

# A part's process without what it imports: `SCRIPT` is what it does with its settings.
WORKER = """
import json, os, signal, sys, time
part, path = sys.argv[1:]
line = sys.stdin.readline()
if not line:
    sys.exit()
settings = json.loads(line)
report = {"part": part, "origin": settings["origin"], "settings": settings, "results": {}}
report |= {"seconds": 0.0, "running": None}

def write():
    with open(path + ".fake", "w") as file:
        json.dump(report, file)
    os.replace(path + ".fake", path)

def begin(name):
    report["running"] = name
    write()

def find(name, **result):
    if name not in settings["known"]:
        report["results"][name] = {"ok": True, "part": part, **result}
        report["running"] = None
        write()

SCRIPT
report["status"] = "done"
write()
"""


class Command:
    """The command with parts that pretend, and the file that it writes."""

    def __init__(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.worker = folder / "found.json", folder / "worker.py"
        self.monkeypatch = monkeypatch

    def __call__(self, script: str, *more: str, parts: str = "ceiling", commit: str = "c0") -> int:
        self.worker.write_text(WORKER.replace("SCRIPT", script))
        options = ["--scale", "toy", "--out", str(self.path), "--commit", commit]
        self.monkeypatch.setattr(sys, "argv", ["gpu_check", *options, "--parts", parts, *more])
        with pytest.raises(SystemExit) as ended:
            gpu_check.main()
        assert not list(self.path.parent.glob("*.draft")), "a draft is left"
        return int(ended.value.code or 0)

    @property
    def parts(self) -> dict[str, Any]:
        """What is in the file."""
        return json.loads(self.path.read_text())["parts"]


@pytest.fixture
def command(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Command(tmp_path, monkeypatch)
    monkeypatch.setattr(processes, "WORKER", (sys.executable, str(made.worker)))
    monkeypatch.setattr(gpu_check, "_machine", lambda: {"gpu": "none"})
    monkeypatch.setattr(gpu_check, "LEAST_S", 0.01)
    monkeypatch.setattr(processes, "HUNG_S", 0.1)
    handler = signal.getsignal(signal.SIGTERM)
    yield made
    signal.signal(signal.SIGTERM, handler)


def test_a_part_without_time_is_not_begun_and_keeps_what_it_had(command: Command):
    assert command("find('a')", parts="ceiling,decode") == 0
    before = command.parts
    assert command("find('b')", "--budget", "0", parts="ceiling,decode") == 3
    assert command.parts == before


def test_a_part_that_is_cut_short_keeps_what_it_had_with_its_own_origin(command: Command):
    assert command("find('a', got=1), find('b', got=1)", commit="c0") == 0
    script = "find('b', got=2), time.sleep(60)"
    assert command(script, "--budget", "1.5", commit="c1") == 3
    found = command.parts["ceiling"]
    assert found["status"] == "cut short"
    assert found["origin"]["commit"] == "c1"
    assert {name: one["got"] for name, one in found["results"].items()} == {"a": 1, "b": 2}
    assert found["results"]["a"]["origin"]["commit"] == "c0"
    assert "origin" not in found["results"]["b"]


def test_what_an_earlier_commit_got_wrong_does_not_fail_this_one(command: Command):
    assert command("find('a', ok=False)", commit="c0") == 1
    assert command("find('b')", commit="c1") == 0
    assert set(command.parts["ceiling"]["results"]) == {"a", "b"}


def test_resuming_begins_no_part_that_is_done_and_still_fails_for_it(command: Command):
    assert command("find('a', ok=False)") == 1
    before = command.parts
    assert command("find('b')", "--resume") == 1
    assert command.parts == before


def test_resuming_finds_only_what_is_missing_of_a_part(command: Command):
    assert command("find('a', got=1), time.sleep(60)", "--budget", "1.5") == 3
    assert command("find('a', got=2), find('b', got=2)", "--resume") == 0
    results = command.parts["ceiling"]["results"]
    assert {name: one["got"] for name, one in results.items()} == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "other", [{"commit": "c1"}, {"more": ("--backend", "xla")}, {"more": ("--only", "a")}], ids=str
)
def test_resuming_redoes_what_is_of_something_else(command: Command, other: dict[str, Any]):
    assert command("find('a', got=1)") == 0
    options = {"commit": other.get("commit", "c0")}
    script = "find('a', got=2), find('b')"
    assert command(script, "--resume", *other.get("more", ()), **options) == 0
    results = command.parts["ceiling"]["results"]
    is_narrower = "--only" in other.get("more", ())  # results are the same by name
    assert results["a"]["got"] == (1 if is_narrower else 2)
    assert "b" in results


def test_an_unknown_commit_is_nobodys(command: Command):
    assert command("find('a', got=1)", commit=reports.UNKNOWN) == 0
    assert command("find('a', got=2)", "--resume", commit=reports.UNKNOWN) == 0
    assert command.parts["ceiling"]["results"]["a"]["got"] == 2


def test_a_file_of_another_gpu_is_refused(command: Command, monkeypatch: pytest.MonkeyPatch):
    assert command("find('a')") == 0
    monkeypatch.setattr(gpu_check, "_machine", lambda: {"gpu": "other"})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--scale", "toy", "--out", str(command.path)])
    message = "has results of none, this is other: give --out another"
    with pytest.raises(SystemExit, match=message):
        gpu_check.main()


def test_a_part_that_hangs_is_named_with_what_it_was_at_and_the_others_go_on(
    command: Command, capsys: pytest.CaptureFixture[str]
):
    script = "find('a'), begin('b'), time.sleep(60 if part == 'ceiling' else 0)"
    assert command(script, "--limit", "1.5", parts="ceiling,decode") == 1
    found = command.parts["ceiling"]
    assert found["status"] == "failed"
    assert found["error"].startswith("hung in b: at it for ")
    assert found["results"]["b"]["ok"] is False
    assert command.parts["decode"]["status"] == "done"
    assert "hung in b" in capsys.readouterr().out
    # What hung is known, so that the rest of the part can be found.
    again = "begin('b') if 'b' not in settings['known'] else find('c')"
    assert command(again, "--resume", parts="ceiling,decode") == 1
    found = command.parts["ceiling"]
    assert found["status"] == "done"
    assert set(found["results"]) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ((), "it has no results"),
        (("--only", "7/7/7"), "it has no results: no name in it contains --only '7/7/7'"),
    ],
    ids=str,
)
def test_a_part_without_results_fails(command: Command, more: tuple[str, ...], error: str):
    assert command("", *more) == 1
    assert command.parts["ceiling"]["status"] == "failed"
    assert command.parts["ceiling"]["error"] == error


def test_a_part_that_dies_fails(command: Command):
    assert command("find('a'), sys.exit(7)") == 1
    assert command.parts["ceiling"]["error"] == "exit status 7"
    assert set(command.parts["ceiling"]["results"]) == {"a"}


def test_what_is_terminated_leaves_no_process_and_loses_no_result(command: Command):
    script = "find('a', pid=os.getpid()), os.kill(os.getppid(), signal.SIGTERM), time.sleep(60)"
    assert command(script, parts="ceiling,decode") == gpu_check.TERMINATED
    found = command.parts["ceiling"]
    assert found["status"] == "cut short"
    with pytest.raises(ProcessLookupError):
        os.kill(found["results"]["a"]["pid"], 0)


def test_what_was_killed_is_found_by_the_next_run(command: Command):
    assert command("find('a')", parts="decode") == 0
    origin = command.parts["decode"]["origin"]
    draft = reports.draft_path(command.path, "ceiling")
    left = {"part": "ceiling", "origin": origin, "settings": {"only": None}, "running": "c"}
    draft.write_text(json.dumps(left | {"results": {"b": {"ok": True, "got": 1}}}))
    assert command("find('b', got=2), find('c')", "--resume") == 0
    results = command.parts["ceiling"]["results"]
    assert results["b"]["got"] == 1
    assert "c" in results


def test_a_file_from_before_there_were_origins_is_read(tmp_path: pathlib.Path):
    path = tmp_path / "old.json"
    part = {
        "status": "done",
        "settings": {"backend": "pallas-gpu", "scale": "full", "only": None},
        "versions": {"jax": "0.11.2"},
        "results": {"a": {"ok": True}},
    }
    head = {"machine": {"gpu": "H100"}, "commit": "c0", "date": "then"}
    path.write_text(json.dumps(head | {"parts": {"decode": part}}))
    found = reports.read_report(path, {"machine": {"gpu": "H100"}})["parts"]["decode"]
    assert found["origin"] == {
        "commit": "c0",
        "date": "then",
        "gpu": "H100",
        "jax": "0.11.2",
        "backend": "pallas-gpu",
        "scale": "full",
    }


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ("print('cpu')", "its JAX has a cpu alone"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("import time; time.sleep(60)", "it finds no device within 0.5 s"),
    ],
    ids=str,
)
def test_a_python_that_cannot_check_is_named_at_once(
    command: Command, monkeypatch: pytest.MonkeyPatch, probe: str, message: str
):
    monkeypatch.setattr(gpu_check, "PROBE", probe)
    monkeypatch.setattr(gpu_check, "PROBE_S", 0.5)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(command.path)])
    with pytest.raises(SystemExit, match=message) as ended:
        gpu_check.main()
    assert "make gpu-check PYTHON=" in str(ended.value)
    assert not command.path.exists()


def test_changes_to_the_code_make_another_commit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert gpu_check._commit() == reports.UNKNOWN
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a.py").write_text("1\n")
    for arguments in (["init", "-q"], ["add", "a.py"], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *arguments], check=True)
    clean = gpu_check._commit()
    found = [clean]
    for text in ("2\n", "3\n"):
        (tmp_path / "a.py").write_text(text)
        found.append(gpu_check._commit())
    assert len(set(found)) == 3
    assert all(one.startswith(f"{clean}-dirty-") for one in found[1:])


def test_the_budget_lies_within_what_a_command_often_has():
    assert gpu_check.BUDGET_S + processes.KILL_S < 600
    assert set(gpu_check.UNTIMED) == {"correctness", "parity"}
    groups = gpu_check._groups(list(gpu_check.LIMITS))
    assert ["mosaic"] in groups


def test_a_real_part_is_a_process_that_records(tmp_path: pathlib.Path):
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--scale", "toy", "--backend", "xla"]
    command += ["--out", str(path), "--parts", "ceiling"]
    assert subprocess.run(command, check=False).returncode == 0
    found = json.loads(path.read_text())["parts"]["ceiling"]
    assert found["status"] == "done"
    assert "copy" in found["results"]
    assert found["settings"]["scale"] == "toy"


def test_a_table_shows_what_failed_and_what_is_absent():
    found = {
        "status": "done",
        "seconds": 1.0,
        "results": {
            "right": {"ok": True, "us": 4.0, "min_us": 3.9, "max_us": 4.1, "gbps": 1000.0},
            "wrong": {"ok": False, "error": "over the bound", "error_norm": 0.5},
            "absent": {"ok": True, "error": "not installed"},
        },
    }
    text = "\n".join(part_lines("decode", found))
    assert "2 ok, 1 FAILED" in text
    assert "right: 4.0 us 1000 GB/s" in text
    assert "FAILED wrong: over the bound" in text
    assert "absent: none: not installed" in text
