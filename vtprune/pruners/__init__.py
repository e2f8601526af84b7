# SPDX-License-Identifier: Apache-2.0
"""The built-in methods. Importing this package registers them."""

from . import divprune, grid, idpruner, norm, random

__all__ = ["divprune", "grid", "idpruner", "norm", "random"]
