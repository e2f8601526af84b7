# SPDX-License-Identifier: Apache-2.0
"""EmbedLens: see what each visual token says, and act on it.

>>> import vtprune
>>> seen = vtprune.lens(model, inputs, processor=processor)     # the module itself can be called: it is `lens.lens`
>>> seen.categories().shares()                                  # sink, dead, alive
>>> with vtprune.lens.skip(model, [1.5], tokens="alive"):       # interventions, for generate() too
...     model.generate(**inputs)
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import CLASSES, Calibration, Categories
    from .clusters import calibrate, shares
    from .compression import Patch, patches
    from .interventions import inject, skip
    from .probe import Lens, lens

# Imported at first use: `embedlens` among the pruners needs the calibration, not the engine above it.
_HOMES = {
    "calibration": ("CLASSES", "Calibration", "Categories"),
    "clusters": ("calibrate", "shares"),
    "compression": ("Patch", "patches"),
    "interventions": ("inject", "skip"),
    "probe": ("Lens", "lens"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CLASSES",
    "Calibration",
    "Categories",
    "Lens",
    "Patch",
    "calibrate",
    "inject",
    "lens",
    "patches",
    "shares",
    "skip",
]


class _Module(ModuleType):
    """A module that can be called: ``vtprune.lens(model, inputs)`` is `lens.lens`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.lens(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Module
