# SPDX-License-Identifier: Apache-2.0
"""The VASparse benchmark runs, and counts right."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from benchmarks import vasparse


def test_shares_are_counted_over_all_pictures() -> None:
    hits = np.array([[True, False, False], [True, True, False]])
    of = np.array([[True, True, False], [True, True, True]])
    value, margin = vasparse.share(hits, of)
    assert value == 0.6 and 0 < margin < 0.1  # 1 of 2 and 2 of 3: pictures differ little
    assert vasparse.share(hits & False, of) == (0.0, 0.0)


def test_the_script_runs_and_its_rows_are_consistent(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    methods = ["dense", "contrast", "vasparse", "vasparse select=both"]
    asked = ["--pictures", "1", "--tokens", "2", "--runs", "1", "--shown", "1/18 of basic", "--methods", *methods]
    assert vasparse.main([*asked, "--commit", "abc", "--out", str(out)]) == 0
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == methods and {row["commit"] for row in rows} == {"abc"}
    for row in rows:
        wrong = float(row["false_yes"]) * int(row["absent"])
        assert abs(wrong - float(row["wrong_per_picture"])) < 0.01
        assert 0 <= float(row["exist_right"]) <= 1 and float(row["tokens_per_s"]) > 0
