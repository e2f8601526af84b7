# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of accuracy and the board run from end to end, on a few questions."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import accuracy, board
from vtprune.eval import read, sweep


def test_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "RUNS", dict.fromkeys(accuracy.RUNS, (1, 0)))
    out, rows = tmp_path / "accuracy.csv", tmp_path / "rows.jsonl"
    given = ["--questions", "6", "--batch", "3", "--split", "val", "--keep", "1/9", "--methods", "norm"]
    assert accuracy.main([*given, "--commit", "abc", "--rows", str(rows), "--out", str(out)]) == 0
    with out.open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(row["method"], row["keep"], row["tokens"]) for row in table] == [
        ("dense", "1", "576"),
        ("blank", "1", "576"),
        ("question-only", "0", "0"),
        ("downsampled picture", "1/9", "64"),
        ("norm", "1/9", "64"),
    ]
    assert all(row["commit"] == "abc" and float(row["prefill_ms"]) > 0 for row in table)
    assert float(table[0]["accuracy"]) > 0.8 > float(table[1]["accuracy"])
    answers = read(rows)[1]
    right = sum(row["correct"] for row in answers if row["method"] == "norm")
    assert float(table[4]["accuracy"]) == pytest.approx(right / 6, abs=1e-4)


@pytest.mark.slow
def test_the_board_of_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods and the controls, 20 questions, time and memory on the same row."""
    monkeypatch.setattr("vtprune.eval.cost.REPEATS", 1)
    rows, out = tmp_path / "rows", tmp_path / "out"
    assert board.main(["--ci", "--device", "cpu", "--workers", "1", "--rows", str(rows), "--out", str(out)]) == 0
    with (out / "board.csv").open(encoding="utf-8") as file:
        table = {row["method"]: row for row in csv.DictReader(file) if row["kind"] == "mean"}
    assert [*table] == ["prior", *sweep.ALWAYS, "norm", "divprune"]
    assert all(float(row["ttft_ms"]) > 0 and row["questions"] == "20" for name, row in table.items() if name != "prior")
    assert float(table["dense"]["score"]) > 0.8 > float(table["blank"]["score"])
    assert float(table["norm"]["ttft_ms"]) < float(table["dense"]["ttft_ms"])
    assert (out / "index.html").stat().st_size > 10_000 and (out / "board.png").is_file()
    before, told = (out / "index.html").read_bytes(), []
    monkeypatch.setattr(board, "document", told.append)  # of the guide, which tells of committed boards
    assert board.main(["--draw", "--out", str(out)]) == 0
    assert (out / "index.html").read_bytes() == before and told == []


def test_encoding_once_is_compared_with_each_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "SMALL", ("norm",))
    monkeypatch.setattr(board, "THREE", ("1/9",))
    assert board.main(["--once", "--questions", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("encode-once-*.csv")
    (line,) = csv.DictReader(file.open(encoding="utf-8"))
    assert (line["combinations"], line["answers"], line["answers_that_differ"]) == ("4", "8", "0")
    assert float(line["apart_s"]) >= float(line["apart_warm_s"]) > 0 < float(line["together_s"])
