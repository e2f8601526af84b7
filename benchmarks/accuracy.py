# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a pocket model on fresh PocketVQA questions under every pruner, with measured time on the same row.

    python -m benchmarks.accuracy                                            # on a GPU: about five minutes
    python -m benchmarks.accuracy --questions 480 --batch 40 --keep 1/4 1/9  # on two CPU cores: a quarter of an hour

Beside the methods stand the unpruned model, a grey picture, no picture, ``random``, ``grid``, and a picture that was
simply made smaller until the encoder puts out about as many tokens. The questions are answered by `vtprune.eval`; time
is measured apart from that, vision tower included. `benchmarks/README.md` explains the columns.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import vtprune
from vtprune.eval import controls, runner, summarise, tasks
from vtprune.eval.runner import current_commit as commit
from vtprune.models import find_family

KEEPS = ("1/2", "1/4", "1/9", "1/18")
CONTROLS = ("dense", "blank", "question-only", "downsample")
# `hiprune` needs a middle layer that the pocket models' encoders are too shallow for.
METHODS = (
    *("random", "grid", "pool", "norm", "tome", "dart", "prumerge+", "visionzip", "vispruner", "scope"),
    *("divprune", "cdpruner", "zoo", "globalcom2", "idpruner importance=norm", "idpruner"),
)
#: What the results call a control.
NAMES = {"downsample": "downsampled picture"}
#: Timed forwards and forwards before them; a forward takes seconds on a CPU, milliseconds on a GPU.
RUNS = {"cuda": (10, 3), "cpu": (3, 1)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def prefill_ms(model: Any, inputs: dict[str, Any]) -> float:
    """Median time of one forward over the batch: vision tower, scoring, packing, language model."""
    times = []
    runs, warm_up = RUNS[model.device.type]
    for _ in range(warm_up + runs):
        synchronize(model.device)
        start = time.perf_counter()
        model(**inputs, use_cache=True, logits_to_keep=1)
        synchronize(model.device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[warm_up:])


def timed(
    model: Any, processor: Any, examples: list[tasks.Example], plans: list[runner.Combination]
) -> Iterator[tuple[tuple[str, str], float]]:
    """Label, budget and `prefill_ms` of every method and control."""
    family = find_family(model)
    inputs = controls.prepare(family, processor, examples)
    for method, keep in plans:
        with runner.presented(family, processor, examples, inputs, method, keep) as (given, _):
            yield (method.label, keep), prefill_ms(model, given)


def line(row: dict[str, Any], milliseconds: float) -> dict[str, Any]:
    """One line of the results from one row of `summarise`."""
    kinds = list(row)[list(row).index("all") + 1 :]
    return {
        "method": NAMES.get(row["method"], row["method"]),
        "keep": row["keep"],
        "tokens": f"{row['tokens_out']:g}",
        "accuracy": round(row["mean"], 4),
        "plus_minus": round((row["high"] - row["low"]) / 2, 4),
        **{kind: round(row[kind], 4) for kind in kinds},
        "prefill_ms": round(milliseconds, 2),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-llava")
    parser.add_argument("--task", default="pocketvqa/basic", help=", ".join(tasks.names()))
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--keep", nargs="+", default=list(KEEPS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--commit", default=None)
    parser.add_argument("--rows", type=Path, help="JSONL of every answer, which an interrupted run goes on from")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(arguments)

    model, processor = vtprune.load(given.model, dtype=torch.float32)
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    out = given.out or Path(__file__).parent / "results" / f"accuracy-{where.lower().replace(' ', '-')}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": where,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": given.commit or commit(),
        "model": given.model,
        "split": given.split,
        "questions": given.questions,
        "batch": given.batch,
    }
    methods = [*CONTROLS, *given.methods]
    plans = runner.combinations(methods, given.keep)
    with tempfile.TemporaryDirectory() as folder:
        rows = runner.run(
            *(model, processor, [given.task], methods, given.keep, given.rows or Path(folder) / "rows.jsonl"),
            **{"split": given.split, "count": given.questions, "batch": given.batch},
            **{"name": given.model, "commit": about["commit"], "say": print},
        )
    wanted = {(method.label, keep) for method, keep in plans}
    table = summarise([row for row in rows if row["task"] == given.task and (row["method"], row["keep"]) in wanted])
    first = list(itertools.islice(tasks.get(given.task).examples(given.split, given.batch, 0), given.questions))
    times = dict(timed(model, processor, first, plans))
    with out.open("w", newline="", encoding="utf-8") as file:
        lines = [{**about, **line(row, times[row["method"], row["keep"]])} for row in table]
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    for row in lines:
        print({key: value for key, value in row.items() if key not in about})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
