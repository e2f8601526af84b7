# SPDX-License-Identifier: Apache-2.0
"""Decode-time methods: what a model says and remembers while it writes, beside what it sees."""

from .contrast import SparseContrast
from .evictmerge import evictmerge
from .neurons import core_neurons
from .vasparse import vasparse

__all__ = ["SparseContrast", "core_neurons", "evictmerge", "vasparse"]
