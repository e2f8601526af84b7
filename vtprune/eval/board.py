# SPDX-License-Identifier: Apache-2.0
"""From the answers and costs of one or several sweeps to a board: tables, comparisons, and how far one may prune.

``board.csv`` has a row for each model, task, kind of question (and ``mean``, over the kinds), method and budget;
``overall.csv`` one for each model, method and budget. `page` draws both, and needs nothing else, so a board can be
swept on one machine and drawn on another.
"""

from __future__ import annotations

import csv
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError
from . import metrics, stats
from .controls import CONTROLS
from .sweep import ALWAYS, answers_files
from .table import Row, read, score_of

#: The control that is made from the answers alone.
PRIOR = "prior"
#: Not methods, and so on no Pareto front.
REFERENCES = (*CONTROLS, PRIOR)
#: What must be equal for answers to stand in one table.
SAME = ("weights_sha256", "dtype", "split", "seed")
Column = tuple[str, str]


@dataclass
class Answers:
    """All answers of one model to one task.

    Attributes
    ----------
    ids, kinds
        Of the questions.
    columns
        Method and budget of each column, controls first.
    scores
        ``[questions, columns]`` in [0, 1].
    tokens_in, tokens_out
        Visual tokens before and after, mean over questions, of each column.
    empty
        Answers without a word, of each column.
    broken
        Questions that could not be asked.
    totals
        What the task's metric counts over all questions, of each column.
    headers
        Of all runs.
    """

    ids: list[str]
    kinds: list[str]
    columns: list[Column]
    scores: np.ndarray
    tokens_in: list[float]
    tokens_out: list[float]
    empty: list[int]
    broken: list[str]
    totals: list[dict[str, float]]
    headers: list[Row] = field(default_factory=list)


def _rank(column: Column) -> int:
    order = [PRIOR, *CONTROLS, *ALWAYS]
    return order.index(column[0]) if column[0] in order else len(order)


class _Gathering:
    """Answers of one model to one task, while they are read."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.asked = 0  # questions of the plan, where there is one
        self.headers: list[Row] = []
        self.rows: dict[Column, dict[str, Row]] = {}

    def add(self, row: Row, file: Path, own: set[tuple[str, str, str]]) -> None:
        key = (row["method"], row["keep"], row["id"])
        if key in own:
            raise InputError(f"{file} has two answers of {key[0]} keep={key[1]} to {key[2]}; it was edited, or damaged")
        own.add(key)
        column = self.rows.setdefault((row["method"], row["keep"]), {})
        old = column.get(row["id"])
        if old is not None and old["prediction"] != row["prediction"]:
            raise InputError(
                f"{self.where}: {key[0]} keep={key[1]} answered {key[2]} twice, {old['prediction']!r} and "
                f"{row['prediction']!r}; these runs cannot be merged"
            )
        column[row["id"]] = row

    def finish(self, partial: bool) -> Answers:
        columns = sorted(self.rows, key=_rank)
        every = dict.fromkeys(name for column in self.rows.values() for name in column)
        if len(every) < self.asked and not partial:
            raise InputError(
                f"{self.where}: {self.asked - len(every)} of {self.asked} questions have not been asked yet; run the "
                "sweep to its end, or give --partial for those that all have answered"
            )
        for method, keep in columns:
            missing = len(every) - len(self.rows[method, keep])
            if missing and not partial:
                raise InputError(
                    f"{self.where}: {method} keep={keep} has no answer to {missing} of {len(every)} questions; run the "
                    "sweep to its end, or give --partial for those that all have answered"
                )
        ids = [name for name in every if all(name in column for column in self.rows.values())]
        if not ids:
            raise InputError(f"{self.where}: no question has been answered under all methods yet")
        first = self.rows[columns[0]]
        # Questions in an order of their own: files of many processes hold them in any.
        ids.sort(key=_natural)
        by_column = [[self.rows[column][name] for name in ids] for column in columns]
        scores = np.array([[score_of(row) for row in rows] for rows in by_column]).T
        kinds = [first[name]["kind"] for name in ids]
        broken = [name for name in ids if first[name].get("error")]
        prior = [_prior(by_column[0])]
        guessed = np.array([[metrics.row_score(row, text) for row, text in zip(by_column[0], prior[0], strict=True)]]).T
        said = [{**row, "prediction": text} for row, text in zip(by_column[0], prior[0], strict=True)]
        for row, value in zip(said, guessed[:, 0], strict=True):
            row["score"] = float(value)
        return Answers(
            ids,
            kinds,
            [(PRIOR, "0"), *columns],
            np.concatenate([guessed, scores], 1),
            [float(np.mean([row["tokens_in"] for row in rows])) for rows in (by_column[0], *by_column)],
            [0.0, *(float(np.mean([row["tokens_out"] for row in rows])) for rows in by_column)],
            [0, *(sum(not row["prediction"] and not row.get("error") for row in rows) for rows in by_column)],
            broken,
            [metrics.totals(rows) for rows in (said, *by_column)],
            self.headers,
        )


def _natural(name: str) -> tuple[Any, ...]:
    """Numbers in a name by their size."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in _parts(name))


def _parts(name: str) -> Iterator[str]:
    part = ""
    for letter in name:
        if part and letter.isdigit() != part[-1].isdigit():
            yield part
            part = ""
        part += letter
    if part:
        yield part


def _prior(rows: Sequence[Row]) -> list[str]:
    """The answer that is right most often for each kind of question, whatever the picture; ties to the first word."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        if not row.get("error"):
            counts.setdefault(row["kind"], Counter())[row["answer"]] += 1
    best = {kind: min(found, key=lambda text: (-found[text], text)) for kind, found in counts.items()}
    return ["" if row.get("error") else best[row["kind"]] for row in rows]


def gather(folders: Sequence[str | Path], partial: bool = False) -> dict[str, dict[str, Answers]]:
    """Answers by model and task, of one board or of several.

    Raises
    ------
    ConfigError
        A folder is no board.
    InputError
        Answers are missing, stand twice, contradict each other, or come from other weights or questions.
    """
    found: dict[str, dict[str, _Gathering]] = {}
    for folder in map(Path, folders):
        files, planned = answers_files(folder), _plan(folder).get("models", {})
        if not files:
            raise ConfigError(f"{folder} has no answers/*/*.jsonl, so it is no board; `vtprune eval --out` makes one")
        for file in files:
            headers, rows = read(file)
            own: set[tuple[str, str, str]] = set()
            for header in headers:
                for asked in header["tasks"]:
                    where = f"{header['model']} on {asked['task']}"
                    group = found.setdefault(header["model"], {}).setdefault(asked["task"], _Gathering(where))
                    for key in SAME if group.headers else ():
                        if group.headers[0][key] != header[key]:
                            raise InputError(
                                f"{where}: {file} was made with {key}={header[key]!r}, others with "
                                f"{group.headers[0][key]!r}; they cannot stand in one table"
                            )
                    group.headers.append(header)
                    entry = planned.get(header["model"], {}).get(asked["task"], {})
                    group.asked = max(group.asked, entry.get("questions", 0))
            for row in rows:
                found[headers[0]["model"]][row["task"]].add(row, file, own)
    return {
        model: {name: group.finish(partial) for name, group in sorted(tasks.items()) if group.rows}
        for model, tasks in sorted(found.items())
    }


def _plan(folder: Path) -> Row:
    """What a sweep set out to do, where the board still says so."""
    file = folder / "plan.json"
    try:
        plan: Row = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the plan {file} ({error}); run the sweep again, or take it away") from None
    return plan


def costs_of(folders: Sequence[str | Path]) -> dict[tuple[str, str, str, str], Row]:
    """Costs by model, task, method and budget. All of a task are of one board, the first that has some, and there of
    the last run: times of two runs say nothing beside each other."""
    found: dict[tuple[str, str, str, str], Row] = {}
    for folder in map(Path, folders):
        own: dict[tuple[str, str, str, str], Row] = {}
        for file in sorted(folder.glob("costs/*.jsonl")):
            headers, rows = read(file)
            own |= {(headers[0]["model"], row["task"], row["method"], row["keep"]): row for row in rows}
        there = {key[:2] for key in found}
        found |= {key: row for key, row in own.items() if key[:2] not in there}
    return found


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(
    answers: dict[str, dict[str, Answers]], costs: dict[tuple[str, str, str, str], Row], draws: int = stats.DRAWS
) -> tuple[list[Row], list[Row]]:
    """Rows of ``board.csv`` and of ``overall.csv``.

    Returns
    -------
    board, overall
        ``board``: ``model, task, kind, method, keep, questions, tokens_in, tokens_out``; ``score, low, high`` with a
        95 % interval; ``minus_dense`` and its interval, paired by question; ``relative`` (to dense); ``hard`` and
        ``hard_dense``, the scores on the ``hard_questions`` that ``downsample`` gets wrong at the same budget;
        ``broken`` and ``empty`` answers; ``ttft_ms, total_ms, peak_mib``; and what the task's metric counts besides.
        ``overall``: ``model, method, keep``; ``score``, the mean over tasks; ``relative`` with its interval, the mean
        over tasks of the ratio to dense; ``ttft``, ``total`` and ``peak``, as shares of dense, mean over tasks;
        ``tokens``, likewise; ``hard``, mean over tasks.
    """
    board: list[Row] = []
    overall: list[Row] = []
    for model, by_task in answers.items():
        ratios: dict[Column, list[tuple[float, np.ndarray]]] = {}
        for task, found in by_task.items():
            seed = zlib.crc32(f"{model}/{task}".encode())
            kinds = np.asarray(found.kinds)
            parts = {"mean": np.ones(len(kinds), bool)}
            if len(set(found.kinds)) > 1:
                parts |= {kind: kinds == kind for kind in dict.fromkeys(found.kinds)}
            dense = next((i for i, (method, _) in enumerate(found.columns) if method == "dense"), None)
            for kind, chosen in parts.items():
                scores, names = found.scores[chosen], kinds[chosen].tolist()
                means, drawn = stats.macro(scores, names), stats.bootstrap(scores, names, draws, seed)
                for at, (method, keep) in enumerate(found.columns):
                    row: Row = {"model": model, "task": task, "kind": kind, "method": method, "keep": keep}
                    row |= {"questions": len(names), "tokens_in": found.tokens_in[at]}
                    row["tokens_out"] = found.tokens_out[at]
                    row |= dict(zip(("score", "low", "high"), stats.interval(means[at], drawn[:, at]), strict=True))
                    if dense is not None:
                        gain = stats.interval(means[at] - means[dense], drawn[:, at] - drawn[:, dense])
                        row |= dict(zip(("minus_dense", "minus_dense_low", "minus_dense_high"), gain, strict=True))
                        row["relative"] = float(means[at] / means[dense]) if means[dense] else None
                    row |= _hard(found, chosen, at, dense)
                    if kind == "mean":
                        row |= {"broken": len(found.broken), "empty": found.empty[at]}
                        cost = costs.get((model, task, method, keep), {})
                        row |= {key: cost.get(key) for key in ("ttft_ms", "total_ms", "peak_mib")}
                        row |= found.totals[at]
                        if dense is not None and means[dense]:
                            ratio = drawn[:, at] / np.maximum(drawn[:, dense], 1e-12)
                            ratios.setdefault((method, keep), []).append((float(means[at] / means[dense]), ratio))
                    board.append(row)
        overall += _overall(model, board, ratios, len(by_task))
    return board, overall


def _hard(found: Answers, chosen: np.ndarray, at: int, dense: int | None) -> Row:
    """Scores on the questions that down-sampling gets wrong at the same budget."""
    keep = found.columns[at][1]
    if ("downsample", keep) not in found.columns:
        return {"hard": None, "hard_dense": None, "hard_questions": None}
    wrong = chosen & (found.scores[:, found.columns.index(("downsample", keep))] < 0.5)
    if not wrong.any():
        return {"hard": None, "hard_dense": None, "hard_questions": 0}
    return {
        "hard": float(found.scores[wrong, at].mean()),
        "hard_dense": None if dense is None else float(found.scores[wrong, dense].mean()),
        "hard_questions": int(wrong.sum()),
    }


def _overall(
    model: str, board: Sequence[Row], ratios: dict[Column, list[tuple[float, np.ndarray]]], tasks: int
) -> Iterator[Row]:
    means = [row for row in board if row["model"] == model and row["kind"] == "mean"]
    dense = {row["task"]: row for row in means if row["method"] == "dense"}
    for (method, keep), parts in ratios.items():
        own = [row for row in means if (row["method"], row["keep"]) == (method, keep)]
        drawn = np.mean([ratio for _, ratio in parts], 0)
        value = stats.interval(float(np.mean([ratio for ratio, _ in parts])), drawn)
        row: Row = {"model": model, "method": method, "keep": keep, "tasks": len(own), "of": tasks}
        row["score"] = float(np.mean([r["score"] for r in own]))
        row |= dict(zip(("relative", "relative_low", "relative_high"), value, strict=True))
        row["tokens"] = float(np.mean([r["tokens_out"] / r["tokens_in"] for r in own if r["tokens_in"]] or [0.0]))
        for name in ("ttft_ms", "total_ms", "peak_mib"):
            pairs = [(r[name], dense[r["task"]][name]) for r in own]
            shares = [a / b for a, b in pairs if a is not None and b]
            row[name.split("_")[0]] = float(np.mean(shares)) if len(shares) == len(own) else None
        hard = [r["hard"] for r in own if r["hard"] is not None]
        row["hard"] = float(np.mean(hard)) if hard else None
        yield row


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of points (cost, score) that no other beats in both, by rising cost."""
    front: list[int] = []
    best = -np.inf
    for at in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[at][1] > best:
            front.append(at)
            best = points[at][1]
    return front


def advise(board: Sequence[Row], loss: float) -> list[Row]:
    """How far each kind of question may be pruned: per model, task and kind, the method and the smallest budget whose
    loss against dense stays within `loss` at 95 %, at this budget and at all larger ones that were run. A loss that no
    question showed may still be there: of n questions it is excluded from ``1 - 0.025 ** (1 / n)`` on, whatever the
    bootstrap says, so few questions make nothing safe.

    Parameters
    ----------
    board
        Rows of ``board.csv``.
    loss
        Share of the questions, 0.02 for two points.

    Returns
    -------
    list of dict
        ``model, task, kind, method, keep, tokens_out, tokens_in, minus_dense, minus_dense_low``, the last no higher
        than the questions can tell; method and keep are None where no method is safe at any budget.

    Raises
    ------
    ConfigError
        `loss` is no share.
    """
    if not 0 <= loss < 1:
        raise ConfigError(f"a loss of {loss:g} is no share of the questions; give for example 0.02 for two points")
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in board:
        if row["method"] not in REFERENCES and row.get("minus_dense_low") is not None:
            group = groups.setdefault((row["model"], row["task"], row["kind"]), {})
            seen = -(1 - ((1 - stats.LEVEL) / 2) ** (1 / row["questions"]))
            row = {**row, "minus_dense_low": min(row["minus_dense_low"], seen)}
            group.setdefault(row["method"], []).append(row)
    found = []
    for (model, task, kind), by_method in groups.items():
        safe: list[Row] = []
        for rows in by_method.values():
            rows = sorted(rows, key=lambda row: -row["tokens_out"])
            within = [row["minus_dense_low"] >= -loss for row in rows]
            upto = within.index(False) if False in within else len(rows)
            safe += rows[:upto]
        about = {"model": model, "task": task, "kind": kind}
        if not safe:
            found.append({**about, "method": None, "keep": None})
            continue
        best = min(safe, key=lambda row: (row["tokens_out"], -row["score"], row["method"]))
        keys = ("method", "keep", "tokens_out", "tokens_in", "minus_dense", "minus_dense_low")
        found.append({**about, **{key: best[key] for key in keys}})
    return found


def diff(first: str | Path, second: str | Path) -> list[Row]:
    """What changed from one board to another: every model, task, method and budget that both have.

    Returns
    -------
    list of dict
        ``model, task, method, keep, questions``; ``first, second``, scores on the questions that both asked;
        ``change`` with its 95 % interval, paired by question; ``flipped``, questions whose score changed;
        ``ttft_first, ttft_second`` in ms.

    Raises
    ------
    ConfigError
        They have nothing in common.
    """
    before, after = gather([first]), gather([second])
    costs = costs_of([first]), costs_of([second])
    rows: list[Row] = []
    for model in (name for name in before if name in after):
        for task in (name for name in before[model] if name in after[model]):
            a, b = before[model][task], after[model][task]
            places = {name: at for at, name in enumerate(b.ids)}
            both = [at for at, name in enumerate(a.ids) if name in places]
            other = [places[a.ids[at]] for at in both]
            for column in (c for c in a.columns if c in b.columns and both):
                one = a.scores[both, a.columns.index(column)]
                two = b.scores[other, b.columns.index(column)]
                kinds = [a.kinds[at] for at in both]
                gain = stats.difference(two, one, kinds)
                key = (model, task, *column)
                rows.append(
                    {
                        **{"model": model, "task": task, "method": column[0], "keep": column[1]},
                        "questions": len(both),
                        "first": float(stats.macro(one, kinds)),
                        "second": float(stats.macro(two, kinds)),
                        **dict(zip(("change", "change_low", "change_high"), gain, strict=True)),
                        "flipped": int((one != two).sum()),
                        "ttft_first": costs[0].get(key, {}).get("ttft_ms"),
                        "ttft_second": costs[1].get(key, {}).get("ttft_ms"),
                    }
                )
    if not rows:
        raise ConfigError(f"{first} and {second} have no model, task and method in common")
    return rows


# -- files -------------------------------------------------------------------------------------------------------------


def about(answers: dict[str, dict[str, Answers]], folders: Sequence[str | Path]) -> Row:
    """Where the numbers come from: devices, versions, commits, what was left out and why."""
    headers = [header for tasks in answers.values() for found in tasks.values() for header in found.headers]
    known = ("device", "torch", "transformers", "vtprune", "commit", "dtype", "seed")
    facts: Row = {key: ", ".join(dict.fromkeys(str(h[key]) for h in headers)) for key in known}
    facts["left_out"] = {}
    for folder in map(Path, folders):
        for model, reasons in _plan(folder).get("left_out", {}).items():
            facts["left_out"].setdefault(model, {}).update(reasons)
    facts["broken"] = {
        f"{model} on {task}": found.broken for model, tasks in answers.items() for task, found in tasks.items()
        if found.broken
    }  # fmt: skip
    return facts


def write(
    folders: Sequence[str | Path], out: str | Path, partial: bool = False, draws: int = stats.DRAWS
) -> tuple[list[Row], list[Row]]:
    """Make the tables of one board, or of several that are merged, and write them.

    Parameters
    ----------
    folders
        Boards.
    out
        Where ``board.csv``, ``overall.csv`` and ``about.json`` go.
    partial
        Use the questions that all methods have answered so far.
    draws
        Of the bootstrap.

    Returns
    -------
    board, overall
        As `tables`.
    """
    found = gather(folders, partial)
    board, overall = tables(found, costs_of(folders), draws)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    to_csv(out / "board.csv", board)
    to_csv(out / "overall.csv", overall)
    (out / "about.json").write_text(json.dumps(about(found, folders), indent=1) + "\n", encoding="utf-8")
    return board, overall


def to_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows; the file appears whole or not at all, so that processes may write it at one time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    temporary.replace(path)


def from_csv(path: str | Path) -> list[Row]:
    """Rows of a table, numbers as numbers, empty cells as None.

    Raises
    ------
    ConfigError
        The file cannot be read.
    """
    texts = ("model", "task", "kind", "method", "keep")
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            return [
                {k: v if k in texts else None if v == "" else float(v) for k, v in row.items()}
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the table {path} ({error}); `vtprune board` writes it") from None


def models_of(rows: Iterable[Row]) -> list[str]:
    """Models in the order of their first row."""
    return list(dict.fromkeys(row["model"] for row in rows))
