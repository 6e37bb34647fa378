"""The README's figures come from the result files, and from nowhere else."""

import json

import pytest

from benchmarks import tabulate


def test_the_readme_shows_the_newest_results():
    made = tabulate.tables(tabulate.newest(tabulate.RESULTS))
    text = tabulate.README.read_text()
    assert text == tabulate.with_tables(text, made), "run python -m benchmarks.tabulate --write"
    assert made.count("\n") > 10


def test_the_last_file_of_a_benchmark_and_a_dtype_counts(tmp_path):
    for name, dtype, value in (
        ("2026-01-02-cpu-step.json", "float32", 2),
        ("2026-01-01-cpu-step.json", "float32", 1),
        ("2026-01-01-cpu-step-bfloat16.json", "bfloat16", 3),
        ("2026-01-03-nvidia-step.json", "float32", 4),
    ):
        report = {"benchmark": "step", "dtype": dtype, "value": value}
        (tmp_path / name).write_text(json.dumps(report))
    found = tabulate.newest(tmp_path)
    assert {key: report["value"] for key, report in found.items()} == {
        ("step", "float32"): 2,
        ("step", "bfloat16"): 3,
    }


def test_a_table_goes_between_its_marks_and_nowhere_else():
    text = f"before\n{tabulate.BEGIN}old\n{tabulate.END}after\n"
    assert tabulate.with_tables(text, "new\n") == text.replace("old", "new")
    with pytest.raises(ValueError, match="once each"):
        tabulate.with_tables("no marks", "new\n")


def test_a_comparison_has_a_row_for_each_set_and_a_column_for_each_engine():
    ours = {"output_throughput": 30.0, "jpaged_of_it": 1.0}
    peer = {"output_throughput": 60.0, "jpaged_of_it": 0.5}
    report = {
        "sides": {"jpaged": {"version": "0.1"}, "vllm": {"version": "0.32"}},
        "sets": {"single": {"jpaged": ours, "vllm": peer}},
        "dtype": "float32",
        "date": "2026-01-01",
    }
    made = tabulate.tables({("compare", "float32"): report})
    assert made.splitlines()[-3::2] == [
        "| tokens/s | jpaged 0.1 | vllm 0.32 | date |",
        "| single, float32 | 30 | 60 (0.50) | 2026-01-01 |",
    ]
