# SPDX-License-Identifier: Apache-2.0
"""Answers of a pocket model about clips, with methods and budgets made for video beside the others.

    python -m benchmarks.video                                              # on a GPU
    python -m benchmarks.video --questions 80 --batch 8 --keep 1/4          # on two CPU cores: some minutes

The same run as `benchmarks.accuracy` (which see), on PocketVQA's ``video`` and with other methods: the controls, fewer
frames (``frames``), what repeats the frame before (``evs``), ``vidcom2``, and budgets over time with methods that
know nothing of frames (``norm``, ``idpruner``).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks import accuracy

METHODS = (
    *("random", "grid", "frames", "evs", "vidcom2", "globalcom2", "divprune"),
    *("norm", "norm allocation=change", "norm allocation=vidcom2", "norm allocation=pooled"),
    *("idpruner", "idpruner allocation=change", "idpruner allocation=vidcom2", "evs allocation=equal"),
)


def defaults() -> list[str]:
    """Arguments of `benchmarks.accuracy` that are others here; what the user gives comes after them, and wins."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    out = Path(__file__).parent / "results" / f"video-{where.lower().replace(' ', '-')}.csv"
    return [
        *("--model", "pocket-qwen2.5-vl", "--task", "pocketvqa/video", "--questions", "1000", "--batch", "25"),
        *("--out", str(out), "--methods", *METHODS),
    ]


def main(arguments: list[str] | None = None) -> int:
    return accuracy.main([*defaults(), *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    raise SystemExit(main())
