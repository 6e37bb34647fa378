"""The comparison with other engines: sides are processes; peers here are written by the tests."""

import contextlib
import json
import os
import pathlib
import sys
import time

import pytest

from benchmarks import compare, workload
from benchmarks.peers import PEERS, module_of, process
from benchmarks.peers.process import SideError, SideProcess, environment
from benchmarks.peers.worker import Job
from benchmarks.random_checkpoint import TINY, write_checkpoint

SETS = {"single": [[([1, 2, 3], 4)]], "workload": [[([4, 5], 2), ([6], 3)], [([4, 5, 7], 2)]]}


def job(model="here", program=None) -> Job:
    return Job(
        model=model, dtype="float32", max_num_seqs=4, max_model_len=320, program=program, sets=SETS
    )


@pytest.fixture
def tiny(tmp_path):
    return str(write_checkpoint(tmp_path / "tiny", TINY, seed=0))


def answer(token_ids, seconds=2.0, others=0.01):
    return {
        "token_ids": token_ids,
        "seconds": seconds,
        "others_share": others,
        "peak_rss_bytes": 10**9,
    }


def test_our_side_answers_every_set_in_its_own_process_until_it_fails(tiny):
    side = SideProcess("jpaged", sys.executable, job(tiny))
    try:
        assert set(side.ready) == {"version", "load_s", "warm_up_s"}
        first, again = side.run("workload"), side.run("workload")
        assert [len(ids) for ids in first["token_ids"]] == [2, 3, 2]
        assert again["token_ids"] == first["token_ids"]  # greedy, and the cache was emptied
        assert first["peak_rss_bytes"] > 10**7
        assert [len(ids) for ids in side.run("single")["token_ids"]] == [4]
        with pytest.raises(SideError, match="ended with status"):
            side.run("no such set")
    finally:
        side.close()


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_that_is_not_installed_says_what_is_missing(peer, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    modules = {"vllm": "vllm", "openvino": "openvino", "transformers": "torch"}
    missing = f"No module named '{modules[peer]}'" if peer in modules else "no program llama"
    with pytest.raises(SideError, match=missing):
        SideProcess(peer, sys.executable, job())


FAKE_SERVER = """#!{python}
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({{"tokens": [len(body["prompt"])] * body["n_predict"]}})

    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

if "--version" in sys.argv:
    print("version: 7 (fake)")
else:
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def processes_of(program):
    """Whoever runs it and has not ended; one that ended has no command line."""
    found = []
    for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.fsencode(program) in file.read_bytes():
                found.append(file)
    return found


def test_a_server_answers_over_http_and_ends_with_its_side(tmp_path):
    program = tmp_path / "llama-server"
    program.write_text(FAKE_SERVER.format(python=sys.executable))
    program.chmod(0o755)
    side = SideProcess("llama.cpp", sys.executable, job(program=str(program)))
    assert side.ready["version"] == "7 (fake)"
    answer = side.run("workload")  # of a second server: a reset ends the first
    assert answer["token_ids"] == [[2, 2], [1, 1, 1], [3, 3]]
    assert processes_of(program)
    side.close()
    deadline = time.monotonic() + 30
    while processes_of(program):  # killed, and on their way out
        assert time.monotonic() < deadline, "a server outlives its side"
        time.sleep(0.01)


def test_a_side_that_does_not_answer_is_not_waited_for(tiny, monkeypatch):
    monkeypatch.setattr(process, "ANSWER_S", 0.01)
    with pytest.raises(SideError, match=r"no answer within 0.01 s"):
        SideProcess("jpaged", sys.executable, job(tiny))


def test_a_peer_without_a_model_is_not_started():
    with pytest.raises(SideError, match="--peer-model"):
        SideProcess("vllm", sys.executable, job(""))


def test_an_interpreter_that_is_not_there_is_named():
    with pytest.raises(SideError, match="/no/python"):
        SideProcess("vllm", "/no/python", job())


def test_a_peers_process_does_not_see_our_packages(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    assert "PYTHONPATH" not in environment("vllm", "/env/bin/python")
    assert environment("jpaged", sys.executable)["PYTHONPATH"].endswith("/ours")
    assert module_of("llama.cpp") == "benchmarks.peers.llama_cpp_side"


def test_figures_are_those_of_the_median_and_ratios_those_of_each_turn():
    ours = [answer([[1, 2], [3, 4]], 2.0), answer([[1, 2], [3, 4]], 4.0)]
    peers = [answer([[1, 2], [3, 9]], 3.0), answer([[1, 2], [3, 9]], 8.0, others=0.2)]
    found = compare._figures(peers, ours)
    assert found["output_throughput"] == pytest.approx(4 / 5.5, abs=0.01)
    assert found["jpaged_of_it"] == 1.75  # of 1.5 and 2
    assert found["agrees"] == 0.75
    assert compare._rotated(["a", "b", "c"], 4) == ["b", "c", "a"]
    assert found["others_share"] == 0.2


def test_drawn_sets_have_the_promised_shapes():
    requests = workload.drawn_requests(vocab_size=50, seed=0)
    prefixes = workload.drawn_prefixes(vocab_size=50, seed=0)
    sets = workload.make_sets(requests, prefixes)
    assert tuple(sets) == workload.NAMES
    ((prompt, count),) = sets["single"][0]
    assert (len(prompt), count) == workload.SINGLE
    assert len(sets["workload"][0]) == 64
    first, rest = sets["prefix-led"]
    assert (len(first), len(rest)) == (8, 56)
    assert sorted(first + rest) == sorted(sets["prefix"][0])
    led = {tuple(prompt[: workload.NUM_SHARED]) for prompt, _ in first}
    assert {tuple(prompt[: workload.NUM_SHARED]) for prompt, _ in rest} == led


def test_sets_that_would_not_be_what_they_are_called_are_refused():
    prompt = [1] * 300
    with pytest.raises(ValueError, match="a prompt of 128 tokens"):
        workload.make_sets([(prompt[:5], 1)], [(prompt, 1), (prompt, 1)])
    with pytest.raises(ValueError, match="share their first 256"):
        workload.make_sets([(prompt, 1)], [(prompt, 1), ([2] * 300, 1)])


@pytest.mark.parametrize("text", ["", "{}", '{"prompt_token_ids": 3, "output_len": 1}', "no"])
def test_a_workload_that_cannot_be_read_is_refused_by_its_line(tmp_path, text):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt_token_ids": [1], "output_len": 2}\n' + text + "\n" if text else "")
    with pytest.raises(ValueError, match=r"line 2|no requests"):
        workload.read_requests(file)


def test_the_command_prints_a_table_and_says_who_was_skipped(tiny, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "requests.jsonl"
    file.write_text(2 * (json.dumps({"prompt_token_ids": [3] * 300, "output_len": 4}) + "\n"))
    plot = tmp_path / "compare.png"
    words = ["compare", "--model", tiny, "--peers", "vllm", "--repeats", "2", "--plot", str(plot)]
    words += ["--workload", str(file), "--prefix-workload", str(file), "--sets", "workload"]
    monkeypatch.setattr(sys, "argv", words)
    compare.main()
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert report["sets"]["workload"]["jpaged"]["jpaged_of_it"] == 1.0
    assert len(report["sets"]["workload"]["jpaged"]["seconds"]) == 2
    assert "No module named 'vllm'" in report["skipped"]["vllm"]
    assert report["skipped"]["openvino"] == "not asked for"
    assert "vllm: skipped" in out
    assert plot.stat().st_size > 1000
