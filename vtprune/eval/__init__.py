# SPDX-License-Identifier: Apache-2.0
"""Accuracy under pruning: tasks x methods x budgets, encoded once and pruned many times, beside honest controls.

>>> from vtprune.eval import evaluate
>>> rows = evaluate("pocket-llava", ["pocketvqa/basic"], ["dense", "norm"], ["1/4"], "out.jsonl")  # doctest: +SKIP

A board, which goes on after a kill and has time beside accuracy:

>>> from vtprune.eval import Request, board, page, sweep
>>> request = Request(("pocket-llava",), ("pocketvqa/basic",), ("norm",), ("1/4",))
>>> folder = sweep.sweep(request, "board")  # doctest: +SKIP
>>> rows, overall = board.write([folder], folder)  # doctest: +SKIP
>>> page.draw(folder)  # doctest: +SKIP
"""

from .controls import CONTROLS
from .runner import evaluate, run
from .stats import Interval, accuracy, difference
from .sweep import Request
from .table import read, summarise, to_csv, to_markdown
from .tasks import Example, Task, get, names, register

__all__ = [
    "CONTROLS",
    "Example",
    "Interval",
    "Request",
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
