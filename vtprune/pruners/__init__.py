# SPDX-License-Identifier: Apache-2.0
"""The built-in methods. Importing this package registers them."""

from . import (
    cdpruner,
    dart,
    divprune,
    embedlens,
    globalcom2,
    grid,
    hiprune,
    idpruner,
    norm,
    pool,
    prumerge,
    random,
    scope,
    tome,
    visionzip,
    vispruner,
    worst,
    zoo,
)

__all__ = [
    "cdpruner",
    "dart",
    "divprune",
    "embedlens",
    "globalcom2",
    "grid",
    "hiprune",
    "idpruner",
    "norm",
    "pool",
    "prumerge",
    "random",
    "scope",
    "tome",
    "visionzip",
    "vispruner",
    "worst",
    "zoo",
]
