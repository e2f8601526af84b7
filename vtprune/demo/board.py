# SPDX-License-Identifier: Apache-2.0
"""Results in a folder, as rows that can be plotted: boards, and tables of `vtprune eval` and of ``benchmarks/``."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import VTPruneError

#: Larger files are not tables of results.
MAX_BYTES = 5_000_000


@dataclass(frozen=True)
class Result:
    """Accuracy of one method at one budget.

    Parameters
    ----------
    file, model, task
        Where it is from, and what was asked of what.
    method, keep
        Labels as they were written.
    tokens
        Visual tokens that were left, mean over questions.
    accuracy, low, high
        Share of right answers and its 95% interval, where the file has one.
    ms
        Time to the first token or of the prefill, where the file has one.
    """

    file: str
    model: str
    task: str
    method: str
    keep: str
    tokens: float
    accuracy: float
    low: float | None = None
    high: float | None = None
    ms: float | None = None

    @property
    def asked(self) -> str:
        """Model and task in one line."""
        return " ".join(filter(None, (self.model, self.task)))


def read(folder: str | Path) -> dict[str, list[Result]]:
    """Results by the name of their file, those of boards in the folder included; files that hold none are passed
    over."""
    found: dict[str, list[Result]] = {}
    folder = Path(folder)
    for path in [*sorted(folder.glob("*")), *sorted(folder.glob("*/board.csv"))]:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            continue
        try:
            results = _csv(path) if path.suffix == ".csv" else _jsonl(path) if path.suffix == ".jsonl" else []
        except (VTPruneError, OSError, ValueError, KeyError, csv.Error):
            continue
        if results:
            found[str(path.relative_to(folder))] = results
    return found


def _csv(path: Path) -> list[Result]:
    with path.open(encoding="utf-8", newline="") as file:
        return [found for row in csv.DictReader(file) if (found := _result(path.name, row))]


def _jsonl(path: Path) -> list[Result]:
    from .. import eval as evaluation

    headers, answers = evaluation.read(path)
    model = str(headers[-1].get("model", "")) if headers else ""
    return [found for row in evaluation.summarise(answers) if (found := _result(path.name, {"model": model, **row}))]


def _result(file: str, row: dict[str, Any]) -> Result | None:
    """A row of any of our tables, which do not call everything by the same name."""

    def first(*names: str) -> float | None:
        return next((value for name in names if (value := _number(row.get(name))) is not None), None)

    tokens, accuracy = first("tokens_out", "tokens"), first("accuracy", "mean", "score")
    if not row.get("method") or tokens is None or accuracy is None:
        return None
    if row.get("kind") not in (None, "", "all", "mean"):  # a row per kind of question: the mean is there, too
        return None
    low, high, around = (_number(row.get(key)) for key in ("low", "high", "plus_minus"))
    if low is None and around is not None:
        low, high = max(0.0, accuracy - around), min(1.0, accuracy + around)
    return Result(
        file,
        str(row.get("model") or ""),
        str(row.get("task") or row.get("world") or ""),
        str(row["method"]),
        str(row.get("keep") or ""),
        tokens,
        accuracy,
        low,
        high,
        first("ttft_ms", "prefill_ms"),
    )


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
