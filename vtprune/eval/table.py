# SPDX-License-Identifier: Apache-2.0
"""From rows of JSON to a table: one line per task, method and budget, with intervals, as CSV or Markdown."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError
from ..plain import parse_json
from . import stats
from .controls import CONTROLS

Row = dict[str, Any]


def read(path: str | Path) -> tuple[list[Row], list[Row]]:
    """Headers and answers of a file that `run` wrote. A last line without its end, of a run that was killed, is left
    out.

    Raises
    ------
    ConfigError
        The file cannot be read, or a line is not what `run` writes.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the results {path} ({error})") from None
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        rows = [parse_json(line) for line in lines]
        headers = [row for row in rows if row["type"] == "run"]
        answers = [row for row in rows if row["type"] != "run"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a file of results ({error}); give one that vtprune's runner wrote") from None
    return headers, answers


def score_of(row: Row) -> float:
    """What an answer is worth; files of earlier versions say right or wrong."""
    return float(row["score"] if "score" in row else row["correct"])


def summarise(rows: Sequence[Row], baseline: str = "dense", draws: int = stats.DRAWS, seed: int = 0) -> list[Row]:
    """One row per task, method and budget: controls first, then methods in the order of their first appearance.

    Parameters
    ----------
    rows
        Answers, as `read` or `run` returns them.
    baseline
        Label of the method that the others are compared to, question by question; must have one budget.
    draws, seed
        As in `stats.bootstrap`.

    Returns
    -------
    list of dict
        ``task, method, keep, questions``; ``tokens_in, tokens_out`` (visual tokens, mean over questions); ``mean, low,
        high`` (mean over kinds with its 95% interval); ``difference, difference_low, difference_high`` (to the
        baseline, paired; None where the task has none); ``all`` (share of all questions); and one key per kind.

    Raises
    ------
    InputError
        A combination lacks questions that another one of its task answered: the run was not finished.
    """
    table: list[Row] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        groups: dict[tuple[str, str], dict[str, Row]] = {}
        for row in rows:
            if row["task"] == task:
                groups.setdefault((row["method"], row["keep"]), {})[row["id"]] = row
        groups = dict(sorted(groups.items(), key=lambda item: _rank(item[0][0])))
        ids = list(dict.fromkeys(name for group in groups.values() for name in group))
        for (method, keep), group in groups.items():
            if len(group) < len(ids):
                raise InputError(
                    f"{method} keep={keep} has answered {len(group)} of the {len(ids)} questions of {task}; run it to "
                    "the end with the same settings"
                )
        kinds = [next(iter(groups.values()))[name]["kind"] for name in ids]
        correct = np.array([[score_of(group[name]) for group in groups.values()] for name in ids], float)
        means, drawn = stats.macro(correct, kinds), stats.bootstrap(correct, kinds, draws, seed)
        shares = stats.per_kind(correct, kinds)
        reference = next((m for m, (method, _) in enumerate(groups) if method == baseline), None)
        for m, ((method, keep), group) in enumerate(groups.items()):
            gain: Sequence[float | None] = (None, None, None)
            if reference is not None:
                gain = stats.interval(means[m] - means[reference], drawn[:, m] - drawn[:, reference])
            table.append(
                {
                    "task": task,
                    "method": method,
                    "keep": keep,
                    "questions": len(ids),
                    "tokens_in": float(np.mean([row["tokens_in"] for row in group.values()])),
                    "tokens_out": float(np.mean([row["tokens_out"] for row in group.values()])),
                    **dict(zip(("mean", "low", "high"), stats.interval(means[m], drawn[:, m]), strict=True)),
                    **dict(zip(("difference", "difference_low", "difference_high"), gain, strict=True)),
                    "all": float(correct[:, m].mean()),
                    **{kind: float(share[m]) for kind, share in shares.items()},
                }
            )
    return table


def _rank(label: str) -> int:
    return CONTROLS.index(label) if label in CONTROLS else len(CONTROLS)


def to_csv(table: Sequence[Row], path: str | Path, about: Row | None = None) -> None:
    """Write a summary, shares with four decimals.

    Parameters
    ----------
    table
        Of `summarise`.
    path
        Where to.
    about
        Columns that go before each row, such as parts of the header.
    """
    rows = [{**(about or {}), **{key: _rounded(value) for key, value in row.items()}} for row in table]
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _rounded(value: Any) -> Any:
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def to_markdown(table: Sequence[Row]) -> str:
    """A Markdown table for each task: percent, with intervals, and the difference to the baseline."""
    fixed = ["task", "method", "keep", "questions", "tokens_in", "tokens_out", "mean", "low", "high", "all"]
    fixed += ["difference", "difference_low", "difference_high"]
    blocks = []
    for task in dict.fromkeys(row["task"] for row in table):
        rows = [row for row in table if row["task"] == task]
        kinds = [key for key in rows[0] if key not in fixed]
        lines = [["method", "keep", "tokens", "mean (95%)", "against dense", *kinds], ["---"] * (5 + len(kinds))]
        for row in rows:
            gain = "" if row["difference"] is None else _percent(row, "difference", "+")
            shares = [f"{100 * row[kind]:.1f}" for kind in kinds]
            lines.append([row["method"], row["keep"], f"{row['tokens_out']:.0f}", _percent(row, "mean"), gain, *shares])
        title = f"{task}, {rows[0]['questions']} questions\n\n"
        blocks.append(title + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(blocks) + "\n"


def _percent(row: Row, key: str, sign: str = "") -> str:
    low, high = ("low", "high") if key == "mean" else (f"{key}_low", f"{key}_high")
    return f"{100 * row[key]:{sign}.1f} [{100 * row[low]:{sign}.1f}, {100 * row[high]:{sign}.1f}]"
