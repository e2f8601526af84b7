# SPDX-License-Identifier: Apache-2.0
"""The trained selector against every training-free method, on questions that were used for no choice.

    python -m benchmarks.selector                                  # the selector that ships with pocket-llava
    python -m benchmarks.selector --selector path/to/selector.safetensors
    python -m benchmarks.selector --questions 96 --worlds basic    # on a CPU, to see it run

Test split, budgets 1/9 and 1/18. `selector-<gpu>.csv` has a row per world, kind of question ("all": their mean),
method and budget: accuracy, and what the selector is better by, question by question, with 95 % intervals. World
`pocketvqa` is the mean over those of PocketVQA, of which easy-VQA is none. `pair` has two pictures in a prompt, which
the selector was never trained on. Methods that prune inside the language model (`fastv`, `pyramiddrop`, `sparsevlm`,
`catp`) pay for layers with all tokens, which no method before it does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.answers import BATCH, RESULTS, ROWS, Answers, answer, batch_of, rows_file, together, write
from benchmarks.papers import about, named
from benchmarks.side_by_side import Job, default_workers, side_by_side
from vtprune.eval import stats
from vtprune.eval.runner import current_commit as commit

MODEL, WORLDS, KEEPS = "pocket-llava", ("basic", "extended", "clutter", "easy-vqa", "pair"), ("1/9", "1/18")
BASELINES = ("random", "grid", "pool", "norm")
FREE = (
    *("tome", "dart", "prumerge+", "visionzip", "vispruner", "hiprune object_layer=2", "scope", "divprune", "cdpruner"),
    *("zoo", "globalcom2", "embedlens", "idpruner", "idpruner mmr_lambda=0.1"),
    *("fastv", "pyramiddrop", "sparsevlm", "catp"),
)
SCORER = f"idpruner importance=scorer scorer={MODEL}"
POOLED, OTHER_TASKS = "pocketvqa", ("easy-vqa",)


def rows_of(answers: Answers, world: str, ours: str) -> list[dict[str, Any]]:
    """A row per kind of question, method and budget; differences are ours minus theirs."""
    common = {"model": MODEL, "world": world}
    return compared(answers.correct, answers.kinds, _columns(answers), ours, common, about(answers.header), "selector")


def pooled(found: Sequence[Answers], ours: str) -> list[dict[str, Any]]:
    """A row per method and budget: the mean over worlds, an equal share each. Questions are drawn anew within world and
    kind, each world by a seed of its own, and all methods see the same draws."""
    columns = _columns(found[0])
    means, drawn = np.zeros(len(columns)), np.zeros((stats.DRAWS, len(columns)))
    tokens = np.zeros(len(columns))
    for seed, answers in enumerate(found):
        own = {column[:2]: number for number, column in enumerate(_columns(answers))}
        order = [own[column[:2]] for column in columns]
        right = answers.correct[:, order].astype(float)
        means += stats.macro(right, answers.kinds) / len(found)
        drawn += stats.bootstrap(right, answers.kinds, seed=seed) / len(found)
        tokens += np.asarray(answers.tokens)[order] / len(found)
    columns = [(*column[:2], float(count)) for column, count in zip(columns, tokens, strict=True)]
    start = {"model": MODEL, "world": POOLED, "kind": "all"}
    source = about(together([header for answers in found for header in answers.headers]))
    return _lines(means, drawn, sum(len(answers.kinds) for answers in found), columns, ours, start, source, "selector")


def _columns(answers: Answers) -> list[tuple[str, str, float]]:
    return [(*column, tokens) for column, tokens in zip(answers.combinations, answers.tokens, strict=True)]


def compared(
    correct: np.ndarray, kinds: Sequence[str], columns: Sequence[tuple[str, str, float]], ours: str,
    common: dict[str, Any], source: dict[str, Any], name: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per kind of question ("all": their mean) and column.

    Parameters
    ----------
    correct
        ``[questions, columns]``.
    kinds
        Of each question.
    columns
        Method, budget and visual tokens of each.
    ours, name
        The method that the others are compared to, question by question at the same budget, and what the table calls
        it: ``<name>_minus`` is ours minus theirs.
    common, source
        What all rows begin and end with.
    """
    table = []
    names = np.asarray(kinds)
    found = list(dict.fromkeys(kinds))
    for kind in ("all", *found) if len(found) > 1 else ("all",):
        taken = np.ones(len(names), bool) if kind == "all" else names == kind
        right, own = correct[taken].astype(float), names[taken].tolist()
        means, drawn = stats.macro(right, own), stats.bootstrap(right, own)
        table += _lines(means, drawn, len(right), columns, ours, {**common, "kind": kind}, source, name)
    return table


def _lines(
    means: np.ndarray, drawn: np.ndarray, count: int, columns: Sequence[tuple[str, str, float]], ours: str,
    start: dict[str, Any], source: dict[str, Any], name: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per column, from the means over so many questions and those that were drawn; see `compared`."""
    table = []
    at = {column[:2]: number for number, column in enumerate(columns)}
    minus = (f"{name}_minus", "minus_low", "minus_high")
    for m, (method, keep, tokens) in enumerate(columns):
        row = {**start, "method": method, "keep": keep, "tokens": f"{tokens:g}", "n": count}
        row |= named(("accuracy", "low", "high"), stats.interval(means[m], drawn[:, m]))
        row |= dict.fromkeys(minus, "")
        o = at.get((ours, keep), m)
        if o != m:
            row |= named(minus, stats.interval(means[o] - means[m], drawn[:, o] - drawn[:, m]))
        table.append({**row, **source})
    return table


def tabled(found: dict[str, Answers], selector: str) -> list[dict[str, Any]]:
    """All rows of the answers to each world, the selector's file by its name alone."""
    ours = f"selector weights={selector}"
    table = [row for world, answers in found.items() for row in rows_of(answers, world, ours)]
    several = [answers for world, answers in found.items() if world not in OTHER_TASKS]
    table += pooled(several, ours) if len(several) > 1 else []
    return [{**row, "method": row["method"].replace(selector, Path(selector).name)} for row in table]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--selector", default=MODEL, help="a file, or the model that ships it")
    parser.add_argument("--questions", type=int, default=960, help="of each world")
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS))
    parser.add_argument("--methods", nargs="+", default=["dense", *BASELINES, *FREE, SCORER])
    parser.add_argument("--workers", type=int, default=None, help="processes; default 14 on a GPU, 1 on a CPU")
    parser.add_argument("--rows", type=Path, default=None, help="folder of all answers; default one of its own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--commit", default=None)
    given = parser.parse_args(arguments)
    # A selector is a file that changes under its name, so its answers are never taken from an earlier run by chance.
    folder = given.rows or ROWS.parent / f"selector-{time.time_ns()}"
    folder.mkdir(parents=True, exist_ok=True)
    ours = f"selector weights={given.selector}"
    common = {"model": MODEL, "methods": [*given.methods, ours], "keeps": list(KEEPS), "folder": folder}
    common |= {"commit": given.commit or commit()}
    jobs: list[Job] = []
    for world in given.worlds:
        batch = min(BATCH, batch_of(MODEL, world), given.questions)
        size = given.questions if world == "easy-vqa" else batch  # seeds would repeat some of easy-VQA
        for seed, first in enumerate(range(0, given.questions, size)):
            count = min(size, given.questions - first)
            jobs.append({**common, "world": world, "seed": seed, "count": count, "batch": batch})
    jobs.sort(key=lambda job: -job["count"])
    done = sum(1 for _ in side_by_side(answer, jobs, given.workers or default_workers(), 560))
    if done < len(jobs):
        return 1
    files = {world: [rows_file(job) for job in jobs if job["world"] == world] for world in given.worlds}
    table = tabled({world: Answers(own) for world, own in files.items()}, given.selector)
    for row in table:
        if row["kind"] == "all":
            print({key: row[key] for key in ("world", "method", "keep", "n", "accuracy", "low", "high",
                                             "selector_minus", "minus_low", "minus_high")})  # fmt: skip
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    write(given.out / f"selector-{name.lower().replace(' ', '-')}.csv", table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
