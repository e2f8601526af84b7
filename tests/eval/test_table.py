# SPDX-License-Identifier: Apache-2.0
"""From answers to a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from vtprune.errors import ConfigError, InputError
from vtprune.eval import table


def answers(method: str, right: str, keep: str = "1/4", task: str = "t", tokens: int = 4) -> list[dict[str, Any]]:
    """One row per letter of `right`: 1 or 0; kinds a and b take turns."""
    return [
        {
            "type": "answer",
            "task": task,
            "method": method,
            "options": {},
            "keep": keep,
            "id": f"{task}/{i}",
            "kind": "ab"[i % 2],
            "answer": "yes",
            "prediction": "yes" if letter == "1" else "no",
            "correct": letter == "1",
            "tokens_in": 16,
            "tokens_out": tokens + i,
        }
        for i, letter in enumerate(right)
    ]


def test_by_hand() -> None:
    rows = [*answers("norm", "1001"), *answers("dense", "1101", "1", tokens=16)]
    dense, norm = table.summarise(rows, draws=500)
    assert (dense["method"], norm["method"]) == ("dense", "norm")  # controls first
    assert (norm["questions"], norm["tokens_in"], norm["tokens_out"]) == (4, 16, 5.5)
    assert (norm["a"], norm["b"], norm["mean"], norm["all"]) == (0.5, 0.5, 0.5, 0.5)
    assert (dense["a"], dense["b"], dense["mean"]) == (0.5, 1.0, 0.75)
    assert norm["difference"] == -0.25
    assert norm["difference_low"] <= -0.25 <= norm["difference_high"] <= 0
    assert (dense["difference"], dense["difference_low"], dense["difference_high"]) == (0, 0, 0)
    assert dense["low"] <= 0.75 <= dense["high"]


def test_order_of_rows_does_not_matter() -> None:
    rows = [*answers("dense", "110101", "1"), *answers("norm", "100101")]
    shuffled = [*rows[:6], *rows[:5:-1]]
    assert table.summarise(rows, draws=300) == table.summarise(shuffled, draws=300)


def test_without_a_baseline_and_with_two_tasks() -> None:
    rows = [*answers("norm", "10"), *answers("norm", "1111", task="u")]
    first, second = table.summarise(rows, draws=50)
    assert (first["task"], first["mean"], second["task"], second["mean"]) == ("t", 0.5, "u", 1.0)
    assert first["difference"] is None
    assert "| norm | 1/4 |" in table.to_markdown([first, second])


def test_unfinished_runs_are_refused() -> None:
    with pytest.raises(InputError, match=r"norm keep=1/4 has answered 3 of the 4 questions of t"):
        table.summarise([*answers("dense", "1111", "1"), *answers("norm", "111")])


def test_csv(tmp_path: Path) -> None:
    rows = table.summarise([*answers("dense", "110", "1"), *answers("norm", "100")], draws=50)
    table.to_csv(rows, tmp_path / "x.csv", {"commit": "abc"})
    with (tmp_path / "x.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [(row["commit"], row["method"], row["mean"]) for row in found] == [
        ("abc", "dense", "0.75"),
        ("abc", "norm", "0.25"),
    ]


def test_markdown() -> None:
    text = table.to_markdown(table.summarise([*answers("dense", "11", "1"), *answers("norm", "11")], draws=50))
    assert "t, 2 questions" in text
    assert "| norm | 1/4 | 4 | 100.0 [100.0, 100.0] | +0.0 [+0.0, +0.0] | 100.0 | 100.0 |" in text


def test_reading(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        table.read(tmp_path / "none.jsonl")
    (tmp_path / "torn.jsonl").write_text('{"type": "run"}\n{"type": "ans', encoding="utf-8")
    assert table.read(tmp_path / "torn.jsonl") == ([{"type": "run"}], [])
    (tmp_path / "bad.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a file of results"):
        table.read(tmp_path / "bad.jsonl")
