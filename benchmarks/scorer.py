# SPDX-License-Identifier: Apache-2.0
"""IDPruner with the trained scorer against IDPruner without training, on questions that were used for no choice.

    python -m benchmarks.scorer                                  # the scorer that ships with pocket-llava
    python -m benchmarks.scorer --scorer path/to/scorer.safetensors

Test split, budgets 1/9 and 1/18; `scorer-<gpu>.csv` has accuracy, and the paired difference from the training-free
importance, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.answers import BATCH, RESULTS, ROWS, Answers, answer, rows_file, write
from benchmarks.papers import rows_of
from benchmarks.side_by_side import Job, default_workers, side_by_side
from vtprune.eval.runner import current_commit as commit

MODEL, WORLDS, KEEPS = "pocket-llava", ("basic", "extended", "easy-vqa"), ("1/9", "1/18")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorer", default=MODEL, help="a file, or the model that ships it")
    parser.add_argument("--questions", type=int, default=1200, help="of each world")
    parser.add_argument("--workers", type=int, default=None, help="processes; default 14 on a GPU, 1 on a CPU")
    parser.add_argument(
        "--rows", type=Path, default=None, help="folder of all answers; default one beside build/tables"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--commit", default=None)
    given = parser.parse_args(arguments)
    # A scorer is a file that changes under its name, so its answers are never taken from an earlier run by chance.
    folder = given.rows or ROWS.parent / f"scorer-{time.time_ns()}"
    folder.mkdir(parents=True, exist_ok=True)
    free, trained = "idpruner", f"idpruner importance=scorer scorer={given.scorer}"
    common = {"model": MODEL, "methods": ["dense", "random", free, trained], "keeps": list(KEEPS), "folder": folder}
    common |= {"batch": min(BATCH, given.questions), "commit": given.commit or commit()}
    jobs: list[Job] = []
    for world in WORLDS:
        size = given.questions if world == "easy-vqa" else common["batch"]  # seeds would repeat some of easy-VQA
        for seed, first in enumerate(range(0, given.questions, size)):
            jobs.append({**common, "world": world, "seed": seed, "count": min(size, given.questions - first)})
    done = sum(1 for _ in side_by_side(answer, jobs, given.workers or default_workers(), 540))
    if done < len(jobs):
        return 1
    table = []
    for world in WORLDS:
        answers = Answers([rows_file(job) for job in jobs if job["world"] == world])
        table += rows_of(answers, MODEL, world, lambda column: (free if column[0] == trained else "", column[1]))
    for row in table:
        row["method"] = row["method"].replace(given.scorer, Path(given.scorer).name)
        print({key: row[key] for key in ("world", "method", "keep", "n", "accuracy", "low", "high", "difference",
                                         "difference_low", "difference_high")})  # fmt: skip
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    write(given.out / f"scorer-{name.lower().replace(' ', '-')}.csv", table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
