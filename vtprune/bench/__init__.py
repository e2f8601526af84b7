# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of a pruned model on this machine, from the pixels to the tokens; see docs/bench.md."""

from . import report
from .runner import Case, Line, Row, amdahl, break_even, dense, ideal, keep_for, measure, pruned, visual_tokens
from .shapes import PRESETS, build, make_inputs

__all__ = [
    "PRESETS",
    "Case",
    "Line",
    "Row",
    "amdahl",
    "break_even",
    "build",
    "dense",
    "ideal",
    "keep_for",
    "make_inputs",
    "measure",
    "pruned",
    "report",
    "visual_tokens",
]
