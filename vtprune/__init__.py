# SPDX-License-Identifier: Apache-2.0
"""vtprune: drop the visual tokens of vision-language models that do not matter, and see why.

>>> import vtprune
>>> model, processor = vtprune.load("pocket-llava")
>>> with vtprune.apply(model, method="idpruner", keep=0.25):
...     pass  # model.generate(**inputs) runs on a quarter of the visual tokens
"""

from .api import Handle, apply, encode, remove, report, select, using
from .budget import Budget
from .config import PruneConfig
from .models.loading import load
from .registry import Pruner, methods, register
from .tokens import Probe, Selection, Stage, VisualTokens

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Handle",
    "Probe",
    "PruneConfig",
    "Pruner",
    "Selection",
    "Stage",
    "VisualTokens",
    "apply",
    "encode",
    "load",
    "methods",
    "register",
    "remove",
    "report",
    "select",
    "using",
]
