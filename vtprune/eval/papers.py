# SPDX-License-Identifier: Apache-2.0
"""What papers claim, as files that can be run: ``benchmarks/papers/<method>.toml``, claim and result side by side.

A file names checkpoints, tasks of lmms-eval, budgets, and the scores of the paper. Nothing in it was measured here: a
result stands beside a claim only where a board has run that very checkpoint on that very task.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..registry import nearest
from .table import Row
from .tasks import get

#: Where the files lie: in the working folder, or in the checkout that this package is run from.
PLACES = (Path("benchmarks/papers"), Path(__file__).parents[2] / "benchmarks" / "papers")
NOT_RUN = "not run here"


def names() -> list[str]:
    """Papers that there are files of."""
    return sorted({file.stem for place in PLACES for file in place.glob("*.toml")})


def load(name: str) -> Row:
    """The claims of a paper, checked.

    Parameters
    ----------
    name
        A method, such as ``idpruner``, or the path of a file.

    Returns
    -------
    dict
        ``method, paper, source``; ``table``: a list of ``model, tokens, tolerance`` (in points), ``tasks`` (the paper's
        name of each: the task here), ``dense`` (scores by task) and ``expected`` (method to budget to scores by task,
        or to ``average``, the percentage of dense).

    Raises
    ------
    ConfigError
        There is no such file, or it is not of that form.
    """
    if sys.version_info < (3, 11):
        raise ConfigError("files of claims are TOML, which Python reads from version 3.11 on")
    import tomllib

    given = Path(name)
    files = [given] if given.suffix == ".toml" else [place / f"{name}.toml" for place in PLACES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ConfigError(f"there are no claims of {name!r}{nearest(name, names())}; known: {', '.join(names())}")
    try:
        claims = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last where it is nested without end
        raise ConfigError(f"cannot read the claims {file} ({error})") from None
    for key in ("method", "paper", "table"):
        if key not in claims:
            raise ConfigError(f"{file} has no {key!r}; see benchmarks/README.md for what a file of claims holds")
    _check(claims, {"method": str, "paper": str, "table": [dict]}, str(file))
    for table in claims["table"]:
        for key in ("model", "tokens", "tolerance", "tasks", "expected"):
            if key not in table:
                raise ConfigError(f"a table of {file} has no {key!r}; it has {', '.join(table)}")
        _check({"dense": {}} | table, _TABLE, f"a table of {file}")
        for scores in [table.get("dense", {}), *(s for by in table["expected"].values() for s in by.values())]:
            unknown = [task for task in scores if task != "average" and task not in table["tasks"]]
            if unknown:
                raise ConfigError(f"{file} has scores of {unknown[0]!r}, which is none of its tasks")
    return claims


#: What a table of claims holds; `int | float` is a number.
_TABLE = {
    "model": str,
    "tokens": int | float,
    "tolerance": int | float,
    "tasks": {"*": str},
    "dense": {"*": int | float},
    "expected": {"*": {"*": {"*": int | float}}},
}


def _check(value: Any, form: Any, what: str) -> None:
    """Refuse a value that is not of a form: a type, a list of one form, or a table of forms by key (``"*"``: any)."""
    kind: Any = type(form) if isinstance(form, dict | list) else form
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{what} is {str(value)[:40]!r}; see benchmarks/README.md for what a file of claims holds")
    if isinstance(form, list):
        for item in value:
            _check(item, form[0], what)
    if isinstance(form, dict):
        for key, item in value.items():
            if key in form or "*" in form:
                _check(item, form.get(key, form.get("*")), f"{key!r} of {what}")


def lines(claims: Row, board: Sequence[Row] = ()) -> Iterator[Row]:
    """A row per claimed number: what the paper says, what a board found, and whether they agree.

    Yields
    ------
    dict
        ``model, task, method, keep, claim, result, verdict``; the result is None and the verdict `NOT_RUN` where the
        board has no such row.
    """
    found = {(r["model"], r["task"], r["method"], r["keep"]): r for r in board if r["kind"] == "mean"}
    for table in claims["table"]:
        claimed = {"dense": {"1": table.get("dense", {})}, **table["expected"]}
        for method, by_keep in claimed.items():
            for keep, scores in by_keep.items():
                for task, claim in scores.items():
                    row: Row = {"model": table["model"], "task": task, "method": method, "keep": keep, "claim": claim}
                    here = table["tasks"].get(task)
                    one = found.get((table["model"], here, method, keep))
                    result = _average(found, table, method, keep) if task == "average" else None
                    if one is not None:
                        # MME's number is a sum of points, which only `mme:FOLDER` counts; others are percentages.
                        result = one.get("perception") if claim > 100 else 100 * one["score"]
                    row["result"] = result
                    within = result is not None and abs(result - claim) <= table["tolerance"]
                    row["verdict"] = NOT_RUN if result is None else "agrees" if within else "differs"
                    yield row


def _average(found: dict[tuple[str, str, str, str], Row], table: Row, method: str, keep: str) -> float | None:
    """Mean over all tasks of the score as a percentage of dense; None unless all were run."""
    ratios = []
    for here in table["tasks"].values():
        own = found.get((table["model"], here, method, keep))
        dense = found.get((table["model"], here, "dense", "1"))
        if own is None or dense is None or not dense["score"]:
            return None
        ratios.append(100 * own["score"] / dense["score"])
    return sum(ratios) / len(ratios) if ratios else None


def section(board: Sequence[Row]) -> str:
    """Claims and results side by side, as a part of a page; empty without files of claims."""
    parts = []
    for name in names() if sys.version_info >= (3, 11) else ():
        claims = load(name)
        rows = list(lines(claims, board))
        ran = [row for row in rows if row["verdict"] != NOT_RUN]
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_text(row[key]))}</td>" for key in _COLUMNS) + "</tr>" for row in rows
        )
        head = "".join(f"<th>{key}</th>" for key in _COLUMNS)
        state = f"{len(ran)} of {len(rows)} run" if ran else NOT_RUN
        parts.append(
            f"<details><summary>{html.escape(name)} ({html.escape(claims['paper'])}): {state}</summary>"
            f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
        )
    about = "<p>Numbers of papers, as they give them; nothing here was measured unless it says so.</p>"
    return f"<h2>What papers claim</h2>{about}{''.join(parts)}" if parts else ""


_COLUMNS = ("model", "task", "method", "keep", "claim", "result", "verdict")


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float | int) else str(value)


def run(
    name: str,
    out: str | Path | None,
    *,
    device: str | None = None,
    dtype: str = "bfloat16",
    checkpoint: str | None = None,
    count: int = 1_000_000,
    say: Callable[[str], None] = lambda _: None,
    begin: Callable[[int], None] = lambda _: None,
    tick: Callable[[int], None] = lambda _: None,
) -> str:
    """Run a paper's tables and return claim and result side by side, as Markdown.

    Parameters
    ----------
    name
        As for `load`.
    out
        Folder of the board; None only shows the claims.
    device, dtype
        As for `vtprune.load`.
    checkpoint
        Where the model of the tables lies, if not under its own name; for files of one model.
    count
        Questions of each task.
    say, begin, tick
        As for `sweep.sweep`.

    Raises
    ------
    ConfigError
        There is no such file, the checkpoint is not there, or a task cannot be run.
    """
    from . import board as boards
    from .sweep import Request, sweep

    claims = load(name)
    rows: list[Row] = []
    notes = ""
    if out is not None:
        for number, table in enumerate(claims["table"]):
            place = Path(out) / f"table-{number}"
            methods = tuple(table["expected"])
            keeps = tuple(dict.fromkeys(keep for by in table["expected"].values() for keep in by))
            tasks = []
            for task in table["tasks"].values():
                try:
                    tasks.append(get(task).name)
                except ConfigError as error:
                    notes += f"\nnot run: {task}: {error}\n"
            if not tasks:
                continue
            settings: dict[str, Any] = {"split": "test", "count": count, "dtype": dtype, "device": device}
            request = Request((checkpoint or table["model"],), tuple(tasks), methods, keeps, **settings)
            sweep(request, place, say=say, begin=begin, tick=tick)
            found, _ = boards.write([place], place)
            rows += [{**row, "model": table["model"]} for row in found]
    head = f"{claims['method']}, {claims['paper']}: {claims.get('source', '')}\n\n"
    text = "| " + " | ".join(_COLUMNS) + " |\n|" + " --- |" * len(_COLUMNS) + "\n"
    for row in lines(claims, rows):
        text += "| " + " | ".join(_text(row[key]) for key in _COLUMNS) + " |\n"
    return head + text + notes
