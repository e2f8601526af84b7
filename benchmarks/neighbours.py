# SPDX-License-Identifier: Apache-2.0
"""Given methods on given worlds of PocketVQA, beside chance and the best of the six methods that came first.

    python -m benchmarks.neighbours                                   # one GPU: minutes; run it again and it goes on
    python -m benchmarks.neighbours --methods spatten "tokensparse layers=[2,4]" --worlds basic --keep 1/4 1/9
    python -m benchmarks.neighbours --model pocket-qwen2.5-vl --worlds icl video
    python -m benchmarks.neighbours --questions 12 --worlds basic --keep 1/4 --out build/x  # anywhere, to try it

``--methods`` takes labels as `vtprune eval` does: a name, then options as key=value. Every table has the unpruned
model, ``random``, and `SIX`, whether or not they are named. The best of the six is chosen per world and budget on the
very questions that are tabled, which flatters it. ``flops`` is the language model's prefill as a share of the dense one
(`Report`), on the first prompts of the world: methods inside the language model pay for the layers below them, so equal
tokens are not equal work. Test split, 95 % intervals, paired differences; `benchmarks/README.md` explains the columns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vtprune
from benchmarks.answers import RESULTS, ROWS, Answers, answer, batch_of, rows_file, write
from benchmarks.papers import rows_of
from benchmarks.side_by_side import Job, default_workers, loaded, side_by_side
from vtprune.eval import controls, runner, tasks
from vtprune.eval.runner import current_commit as commit
from vtprune.models import find_family

#: What the neighbours come after: IDPruner, ZOO-Prune, GlobalCom2, CATP, CoreMatching and EmbedLens, each at the budget
#: that it is told.
SIX = ("idpruner", "zoo", "globalcom2", "catp", "corematching mode=top_k", "embedlens")
NEIGHBOURS = ("spatten", "tokensparse")
#: Prompts whose FLOPs are taken for those of the world.
PRICED = 4


def labels(given: Sequence[str]) -> list[str]:
    """Every method of a table, each once, in its order."""
    return list(dict.fromkeys(runner.Method.parse(text).label for text in ("dense", "random", *SIX, *given)))


def jobs(
    model: str, world: str, names: list[str], keeps: list[str], questions: int, about: dict[str, Any]
) -> list[Job]:
    """One for each batch of a world's questions, drawn under a seed of its own."""
    size = min(batch_of(model, world), questions)
    step = questions if world == "easy-vqa" else size  # seeds would repeat some of easy-VQA
    common = {"model": model, "world": world, "methods": names, "keeps": keeps, "batch": size, **about}
    return [
        {**common, "seed": seed, "count": min(step, questions - first)}
        for seed, first in enumerate(range(0, questions, step))
    ]


@torch.inference_mode()
def flops(model: str, world: str, names: Sequence[str], keeps: Sequence[str]) -> dict[tuple[str, str], float]:
    """The language model's prefill under each method as a share of the dense one, mean over a few prompts."""
    loaded_model, processor = loaded(model)
    family = find_family(loaded_model)
    task = tasks.get(world if world == "easy-vqa" else f"pocketvqa/{world}")
    found: dict[tuple[str, str], list[float]] = {}
    for example in task.examples("test", PRICED, 0):
        inputs = controls.prepare(family, processor, [example])
        for method, keep in runner.combinations(names, keeps):
            with runner.presented(family, processor, [example], inputs, method, keep) as (shown, _):
                share = 1.0
                if method.name != "dense":
                    loaded_model(**shown, logits_to_keep=1)
                    report = vtprune.report(loaded_model)
                    share = report.flops_after / report.flops_before
            found.setdefault((method.label, keep), []).append(share)
    return {column: round(statistics.fmean(shares), 4) for column, shares in found.items()}


def table(answers: Answers, model: str, world: str, priced: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Rows of one world: each method beside `random` and beside the best of the six at the same budget."""
    right = {(row["method"], row["keep"]): float(row["accuracy"]) for row in rows_of(answers, model, world)}
    six = [runner.Method.parse(name).label for name in SIX]

    def best(keep: str) -> str:
        return max(six, key=lambda name: right.get((name, keep), -1.0))

    to_random = rows_of(answers, model, world, lambda column: ("random", column[1]))
    to_best = rows_of(answers, model, world, lambda column: (best(column[1]), column[1]))
    found = []
    for one, other in zip(to_random, to_best, strict=True):
        if (one["method"], one["keep"]) not in priced:
            continue  # answered by an earlier run, and not asked for now
        row = {key: one[key] for key in ("model", "world", "method", "keep", "tokens")}
        row["flops"] = priced[one["method"], one["keep"]]
        row |= {key: one[key] for key in ("n", "accuracy", "low", "high")}
        row |= {f"minus_random{end}": one[f"difference{end}"] for end in ("", "_low", "_high")}
        row |= {
            "best": other["against"],
            **{f"minus_best{end}": other[f"difference{end}"] for end in ("", "_low", "_high")},
        }
        found.append({**row, **{key: one[key] for key in ("gpu", "torch", "transformers", "commit")}})
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-llava")
    parser.add_argument("--methods", nargs="+", default=list(NEIGHBOURS), help="labels, beside the six")
    parser.add_argument("--worlds", nargs="+", default=["basic", "extended", "clutter"])
    parser.add_argument("--keep", nargs="+", default=["1/4", "1/9", "1/18"])
    parser.add_argument("--questions", type=int, default=600, help="of each world")
    parser.add_argument("--workers", type=int, default=None, help="processes; default 14 on a GPU, 1 on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no more jobs after this time")
    parser.add_argument("--rows", type=Path, default=ROWS.parent / "neighbours", help="folder of all answers")
    parser.add_argument("--name", default="neighbours", help="of the CSV file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--commit", default=None)
    given = parser.parse_args(arguments)
    names = labels(given.methods)
    runner.combinations(names, given.keep)  # a misspelt method costs no run
    folder = given.rows / given.name
    folder.mkdir(parents=True, exist_ok=True)
    about = {"commit": given.commit or commit(), "folder": folder}
    planned = [
        job for world in given.worlds for job in jobs(given.model, world, names, given.keep, given.questions, about)
    ]
    begun, done = time.monotonic(), 0
    workers = min(len(planned), given.workers or default_workers())
    for job, seconds in side_by_side(answer, planned, workers, 60 * given.minutes):
        done += 1
        print(f"{done}/{len(planned)} {job['world']} {job['seed']}: {seconds:.1f} s", flush=True)
    print(f"{done} of {len(planned)} jobs in {time.monotonic() - begun:.0f} s", flush=True)
    if done < len(planned):
        return 1
    lines = []
    for world in given.worlds:
        answers = Answers([rows_file(job) for job in planned if job["world"] == world])
        lines += table(answers, given.model, world, flops(given.model, world, names, given.keep))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    path = given.out / f"{given.name}-{given.model}-{name.lower().replace(' ', '-')}.csv"
    write(path, lines)
    shown = ("world", "method", "keep", "flops", "accuracy", "low", "high", "minus_random", "best", "minus_best")
    for line in lines:
        print({key: line[key] for key in shown})
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
