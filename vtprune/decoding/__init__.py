# SPDX-License-Identifier: Apache-2.0
"""Decode-time methods: what a model says and remembers while it writes, beside what it sees."""

from .neurons import core_neurons

__all__ = ["core_neurons"]
