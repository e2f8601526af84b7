# SPDX-License-Identifier: Apache-2.0
"""In-context learning on PocketVQA: accuracy, time and KV memory by the number of demonstrations.

    python -m benchmarks.icl                       # on a GPU: a few minutes
    python -m benchmarks.icl --smoke --out x.csv   # anywhere: a few questions, proves that the script runs

CATP says that it keeps or raises the accuracy of prompts with demonstrations. Here it stands next to FastV, DivPrune,
chance and the unpruned model, under the same budgets. The label of a picture cannot be known without demonstrations, so
0 shots say what guessing is worth. `benchmarks/README.md` explains the columns.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import vtprune
from benchmarks.accuracy import RUNS, prefill_ms, synchronize
from benchmarks.side_by_side import Job, side_by_side
from vtprune.eval import controls, runner, summarise, tasks
from vtprune.eval.runner import current_commit as commit
from vtprune.models import find_family
from vtprune.models.pocket.worlds import icl

SHOTS = (0, 1, 2, 4, 8)
KEEPS = ("1/3", "2/9", "1/10")
METHODS = ("random", "divprune", "fastv", "catp")
#: Prompts that are timed, one by one.
TIMED = 1


def task(shots: int) -> tasks.Task:
    """The questions of the `icl` world with so many demonstrations; with 0, those of 1 without it."""
    name = f"pocketvqa/icl-{shots}"

    def examples(split: str, count: int, seed: int) -> Iterator[tasks.Example]:
        for index in range(count):
            whole = tasks._pocket_example(name, icl(split, index, seed, max(1, shots))).ready()
            yield whole if shots else replace(whole, messages=whole.messages[-1:])

    return tasks.Task(name, examples)


@torch.inference_mode()
def kv_bytes(model: Any, inputs: dict[str, Any]) -> int:
    """Keys and values that are cached when the prompt is through."""
    cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    return sum(rows.nbytes for layer in cache.layers for rows in (layer.keys, layer.values))


@torch.inference_mode()
def answer_ms(model: Any, inputs: dict[str, Any], new_tokens: int) -> float:
    """Median time of a whole answer of exactly so many tokens."""
    runs, warm_up = RUNS[model.device.type]
    times = []
    for _ in range(warm_up + runs):
        synchronize(model.device)
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        synchronize(model.device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[warm_up:])


def measured(
    model: Any, processor: Any, source: tasks.Task, split: str, plans: list[runner.Combination], timed: int
) -> dict[tuple[str, str], dict[str, float]]:
    """Time and memory of prompts alone in their batch, mean over the first few of the split."""
    family = find_family(model)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for example in source.examples(split, timed, 0):
        inputs = controls.prepare(family, processor, [example])
        for method, keep in plans:
            with runner.presented(family, processor, [example], inputs, method, keep) as (given, _):
                numbers = {
                    "prefill_ms": prefill_ms(model, given),
                    "answer_ms": answer_ms(model, given, source.max_new_tokens),
                    "kv_kib": kv_bytes(model, given) / 1024,
                }
            found.setdefault((method.label, keep), []).append(numbers)
    return {
        plan: {key: round(statistics.fmean(row[key] for row in rows), 2) for key in rows[0]}
        for plan, rows in found.items()
    }


def answers(
    shots: int, file: Path, model: str, methods: list[str], keep: list[str], split: str, questions: int, batch: int,
    commit: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """All answers after so many demonstrations, summed up."""
    loaded = vtprune.load(model, dtype=torch.float32)
    rows = runner.run(
        *(*loaded, [task(shots)], methods, keep, file),
        **{"split": split, "count": questions, "batch": batch, "name": model, "commit": commit, "say": print},
    )
    return summarise(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-qwen2.5-vl", help="an embedded model, or a folder with a checkpoint")
    parser.add_argument("--shots", nargs="+", type=int, default=list(SHOTS))
    parser.add_argument("--keep", nargs="+", default=list(KEEPS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--questions", type=int, default=400, help="per number of shots (default: 400)")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true", help="two questions, two numbers of shots, one budget")
    given = parser.parse_args(arguments)
    timed = TIMED
    if given.smoke:
        given.shots, given.keep, given.questions, given.batch, timed = [0, 2], ["1/3"], 2, 2, 1

    model, processor = vtprune.load(given.model, dtype=torch.float32)
    on_gpu = model.device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else "cpu"
    out = given.out or Path(__file__).parent / "results" / f"icl-{where.lower().replace(' ', '-')}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": where,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": given.commit or commit(),
        "model": Path(given.model).name,
        "split": given.split,
        "questions": given.questions,
    }
    methods = ["dense", *given.methods]
    plans = runner.combinations(methods, given.keep)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[Job] = [
            {"shots": shots, "file": Path(folder) / f"{shots}.jsonl", "methods": methods, "commit": about["commit"]}
            | {name: getattr(given, name) for name in ("model", "keep", "split", "questions", "batch")}
            for shots in sorted(given.shots, reverse=True)
        ]
        answered = side_by_side(answers, jobs, len(jobs) if on_gpu else 1, math.inf)
        found = {job["shots"]: rows for job, rows in answered}
    # The clock runs when the answers are done and the machine is free.
    for shots in sorted(found):
        costs = measured(model, processor, task(shots), given.split, plans, timed)
        for row in found[shots]:
            lines.append(
                {
                    **about,
                    "shots": shots,
                    "method": row["method"],
                    "keep": row["keep"],
                    "tokens_in": f"{row['tokens_in']:g}",
                    "tokens_out": f"{row['tokens_out']:g}",
                    "accuracy": round(row["mean"], 4),
                    "plus_minus": round((row["high"] - row["low"]) / 2, 4),
                    "to_dense": round(row["difference"], 4),
                    "to_dense_low": round(row["difference_low"], 4),
                    "to_dense_high": round(row["difference_high"], 4),
                    **costs[row["method"], row["keep"]],
                }
            )
            print({key: value for key, value in lines[-1].items() if key not in about})
        # After each number of shots: a run that is cut off leaves what it has.
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    print(out)
    return 0 if len(found) == len(given.shots) else 1


if __name__ == "__main__":
    raise SystemExit(main())
