# SPDX-License-Identifier: Apache-2.0
"""Results in a folder, as rows that can be plotted: what `vtprune eval` and the scripts in ``benchmarks/`` write."""

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
        Time of the prefill or of the whole forward, where the file has one.
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
    """Results by the name of their file; files that hold none are passed over."""
    found: dict[str, list[Result]] = {}
    for path in sorted(Path(folder).glob("*")):
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            continue
        try:
            results = _csv(path) if path.suffix == ".csv" else _jsonl(path) if path.suffix == ".jsonl" else []
        except (VTPruneError, OSError, ValueError, KeyError, csv.Error):
            continue
        if results:
            found[path.name] = results
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
    """A row of either kind of table: tokens or tokens_out, accuracy or mean."""
    tokens, accuracy = (
        _number(row.get(new, row.get(old))) for new, old in (("tokens_out", "tokens"), ("accuracy", "mean"))
    )
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
        _number(row.get("prefill_ms")),
    )


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
