# SPDX-License-Identifier: Apache-2.0
"""vtprune: drop the visual tokens of vision-language models that do not matter, and see why.

>>> import vtprune
>>> model, processor = vtprune.load("pocket-llava")
>>> with vtprune.apply(model, method="idpruner", keep=0.25):
...     pass  # model.generate(**inputs) runs on a quarter of the visual tokens
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import Handle, apply, encode, remove, report, select, using
    from .budget import Budget
    from .config import PruneConfig
    from .lens.probe import lens
    from .models.loading import load
    from .registry import Pruner, methods, register
    from .tokens import Probe, Selection, Stage, VisualTokens

# Imported at first use: torch takes seconds, and `vtprune --help` does not need it.
_HOMES = {
    "api": ("Handle", "apply", "encode", "remove", "report", "select", "using"),
    "budget": ("Budget",),
    "config": ("PruneConfig",),
    "models.loading": ("load",),
    "registry": ("Pruner", "methods", "register"),
    "tokens": ("Probe", "Selection", "Stage", "VisualTokens"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

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
    "lens",
    "load",
    "methods",
    "register",
    "remove",
    "report",
    "select",
    "using",
]
#: Subpackages that are there without an import of their own.
_SUBPACKAGES = ("decoding", "lens")


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vtprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
