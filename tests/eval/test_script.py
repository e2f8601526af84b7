# SPDX-License-Identifier: Apache-2.0
"""The accuracy benchmark runs from end to end, on a few questions."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import accuracy
from vtprune.eval import read


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
