# SPDX-License-Identifier: Apache-2.0
"""Answers of a pocket model to one batch of questions under many methods: what tables here are made of.

A job is a batch of one world's test questions, drawn under a seed of its own; `side_by_side` runs jobs in many
processes.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.side_by_side import Job, loaded
from vtprune.eval import read, runner

RESULTS = Path(__file__).parent / "results"
#: Every answer of a run, until the tables are made; not committed.
ROWS = RESULTS.parents[1] / "build" / "tables"

#: Visual tokens of a prompt, at most; the rest have 576, with Qwen 144.
TOKENS = {
    ("pocket-llava", "pair"): 1152,
    ("pocket-llava", "icl"): 2880,
    ("pocket-llava-next", "hires"): 2928,
    ("pocket-qwen2.5-vl", "hires"): 576,
    ("pocket-qwen2.5-vl", "icl"): 720,
    ("pocket-qwen2.5-vl", "video"): 1024,
}
#: Visual tokens and questions of a batch, at most: so that 14 processes fit on one GPU.
TOGETHER, BATCH = 90_000, 96


def batch_of(model: str, world: str) -> int:
    """Questions that are answered together: a multiple of the number of kinds in any world."""
    return min(BATCH, TOGETHER // TOKENS.get((model, world), 576) // 12 * 12)


def rows_file(job: Job) -> Path:
    """The answers of one job."""
    return Path(job["folder"]) / f"{job['model']}-{job['world']}-{job['seed']}.jsonl"


def answer(**job: Any) -> float:
    """Answer one batch of questions under every method; the seconds that it took."""
    begun = time.monotonic()
    model, processor = loaded(job["model"])
    name = job["world"] if job["world"] == "easy-vqa" else f"pocketvqa/{job['world']}"
    settings = {key: job[key] for key in ("count", "seed", "batch", "commit")}
    runner.run(
        *(model, processor, [name], job["methods"], job["keeps"], rows_file(job)),
        **{"split": "test", "name": job["model"], **settings},
    )
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return time.monotonic() - begun


class Answers:
    """All answers of one model to one world.

    Parameters
    ----------
    files
        What `answer` wrote.

    Attributes
    ----------
    combinations
        Method and budget of each column.
    correct
        ``[questions, columns]`` bool.
    kinds
        Of each question.
    tokens
        Visual tokens that the language model saw, mean over questions, of each column.
    headers, header
        The first lines of all files, and what they say together: device, versions, commit.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        right: dict[str, dict[tuple[str, str], bool]] = {}
        kinds: dict[str, str] = {}
        tokens: dict[tuple[str, str], list[int]] = {}
        self.headers: list[dict[str, Any]] = []
        for file in files:
            headers, rows = read(file)
            self.headers += headers
            for row in rows:
                column = (row["method"], row["keep"])
                right.setdefault(row["id"], {})[column] = row["correct"]
                kinds[row["id"]] = row["kind"]
                tokens.setdefault(column, []).append(row["tokens_out"])
        self.header = together(self.headers)
        self.combinations = list(tokens)
        self.correct = np.array([[given[column] for column in self.combinations] for given in right.values()])
        self.kinds = [kinds[name] for name in right]
        self.tokens = [float(np.mean(tokens[column])) for column in self.combinations]


#: Columns of the CSV files, and what they are called in a header.
SOURCE = {"gpu": "device", "torch": "torch", "transformers": "transformers", "commit": "commit"}


def together(headers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One header. A run that went on with other code, or elsewhere, names both."""
    return {**headers[0], **{key: " + ".join(dict.fromkeys(h[key] for h in headers)) for key in SOURCE.values()}}


def about(header: dict[str, Any]) -> dict[str, Any]:
    """Where the numbers come from."""
    return {column: header[key] for column, key in SOURCE.items()}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
