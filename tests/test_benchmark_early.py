# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.early` runs from end to end, and the table of docs/bench.md is that of its file."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import early

ROOT = Path(__file__).parents[1]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_answers_and_times_stand_side_by_side(tmp_path: Path) -> None:
    out = tmp_path / "early.csv"
    few = ["--questions", "2", "--batch", "2", "--rounds", "1", "--methods", "norm", "--keep", "1/9", "--layers", "1"]
    assert early.main([*few, "--tasks", "pocketvqa/basic", "--out", str(out), "--commit", "abc"]) == 0
    rows = table(out)
    assert [(r["tower_keep"], r["tower_left"]) for r in rows] == [
        ("1.0", "576"),
        ("0.75", "432"),
        ("0.5", "288"),
        ("0.25", "144"),
    ]
    for row in rows:
        assert row["tokens_out"] == "64" and float(row["vision_ms"]) < float(row["ttft_ms"])
        assert float(row["gain"]) == pytest.approx(float(row["accuracy"]) - float(rows[0]["accuracy"]), abs=1e-4)
        assert float(row["gain_low"]) <= float(row["gain"]) <= float(row["gain_high"])


def test_time_alone(tmp_path: Path) -> None:
    out = tmp_path / "early.csv"
    assert early.main(["--shape", "tiny-llava", "--layers", "0", "--rounds", "1", "--out", str(out)]) == 0
    assert [r["tower_left"] for r in table(out)] == ["16", "12", "8", "4"]


def test_the_table_of_the_docs_is_the_committed_file() -> None:
    text = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    assert "\n".join(early.markdown(table(ROOT / "benchmarks" / "results" / "early-cpu.csv"))) in text
