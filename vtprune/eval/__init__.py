# SPDX-License-Identifier: Apache-2.0
"""Accuracy under pruning: tasks x methods x budgets, encoded once and pruned many times, beside honest controls.

>>> from vtprune.eval import evaluate
>>> rows = evaluate("pocket-llava", ["pocketvqa/basic"], ["dense", "norm"], ["1/4"], "out.jsonl")  # doctest: +SKIP
"""

from .controls import CONTROLS
from .runner import evaluate, run
from .stats import Interval, accuracy, difference
from .table import read, summarise, to_csv, to_markdown
from .tasks import Example, Task, get, names, register

__all__ = [
    "CONTROLS",
    "Example",
    "Interval",
    "Task",
    "accuracy",
    "difference",
    "evaluate",
    "get",
    "names",
    "read",
    "register",
    "run",
    "summarise",
    "to_csv",
    "to_markdown",
]
