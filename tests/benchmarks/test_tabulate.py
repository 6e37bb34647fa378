"""Tables of figures come from the result files, and from nowhere else."""

import json
import pathlib

import pytest

from benchmarks import figures, gpu_figures, tabulate


def made() -> dict[str, str]:
    results = tabulate.newest(tabulate.RESULTS)
    return {name: make(results) for name, make in tabulate.TABLES.items()}


@pytest.mark.parametrize("page", tabulate.PAGES, ids=lambda page: page.name)
def test_a_page_shows_the_newest_results(page: pathlib.Path):
    text = page.read_text()
    assert text == tabulate.with_tables(text, made()), "run python -m benchmarks.tabulate --write"
    assert "<!-- figures: " in text


def test_every_table_is_on_a_page():
    text = "".join(page.read_text() for page in tabulate.PAGES)
    assert all(f"<!-- figures: {name} -->" in text for name in tabulate.TABLES)


def test_the_last_file_of_a_benchmark_and_a_dtype_counts(tmp_path):
    for name, changes in (
        ("2026-01-02-cpu-step.json", {"value": 2}),
        ("2026-01-01-cpu-step.json", {"value": 1}),
        ("2026-01-01-cpu-step-bfloat16.json", {"dtype": "bfloat16", "value": 3}),
        ("2026-01-03-nvidia-step.json", {"value": 4}),
        ("2026-01-04-cpu-step.json", {"value": 5, "established": False}),
        ("2026-01-04-cpu-compare-vllm-float32.json", {"value": 6, "established": False}),
        ("2026-01-05-nvidia-h100-80gb-hbm3.json", {"value": 8}),
        ("2026-01-04-nvidia-h100-80gb-hbm3.json", {"value": 7}),
        ("2026-01-06-nvidia-h100-80gb-hbm3-candidates.json", {"value": 9}),
    ):
        (tmp_path / name).write_text(
            json.dumps({"benchmark": "step", "dtype": "float32"} | changes)
        )
    found = tabulate.newest(tmp_path)
    values = {key: report["value"] for key, report in found.cpu.items()}
    assert values == {("step", "float32"): 2, ("step", "bfloat16"): 3}
    assert [report["value"] for report in found.beside_vllm.values()] == [6]
    assert [report["value"] for report in found.h100] == [7, 8]


def test_a_table_goes_between_its_marks_and_nowhere_else():
    end = "<!-- end of figures -->\n"
    text = f"before\n<!-- figures: a -->\nold\nolder\n{end}between\n<!-- figures: b -->\n{end}after"
    expected = text.replace("old\nolder\n", "new\n").replace(f"b -->\n{end}", f"b -->\n{{}}\n{end}")
    assert tabulate.with_tables(text, {"a": "new\n", "b": "{}\n"}) == expected
    with pytest.raises(ValueError, match="there is no table 'b'; there are a"):
        tabulate.with_tables(text, {"a": "new\n"})
    with pytest.raises(ValueError, match="marks in pairs, got 1 that begin and 0 that end"):
        tabulate.with_tables("<!-- figures: a -->\n", {"a": "new\n"})


def test_of_each_gpu_figure_the_last_run_that_has_it_counts():
    reports = [
        {"parts": {"decode": {"results": {"a": {"us": 1.0}, "b": {"us": 2.0}}}}},
        {"parts": {"decode": {"results": {"a": {"us": 3.0}}}}},
    ]
    assert [gpu_figures.microseconds(reports, name) for name in "ab"] == [3.0, 2.0]
    with pytest.raises(ValueError, match="no result file has 'c'"):
        gpu_figures.microseconds(reports, "c")


def test_a_comparison_has_a_row_for_each_set_and_a_column_for_each_engine():
    ours = {"output_throughput": 30.0, "jpaged_of_it": 1.0}
    peer = {"output_throughput": 60.0, "jpaged_of_it": 0.5}
    report = {
        "sides": {"jpaged": {"version": "0.1"}, "vllm": {"version": "0.32"}},
        "sets": {"single": {"jpaged": ours, "vllm": peer}},
        "dtype": "float32",
        "date": "2026-01-01",
    }
    table = figures.engines({("compare", "float32"): report})
    assert table.splitlines()[::2] == [
        "| tokens/s | jpaged 0.1 | vllm 0.32 | date |",
        "| single, float32 | 30 | 60 (0.50) | 2026-01-01 |",
    ]
