# SPDX-License-Identifier: Apache-2.0
"""The errors and the warning that vtprune raises: each message names the value, what was expected and the cure."""

from __future__ import annotations


class VTPruneError(Exception):
    """Base of every error that vtprune raises on purpose. The command line prints it as one line and exits with 2."""

    def __str__(self) -> str:
        # One line whatever is in it: names of files, keys of JSON, what other libraries said.
        return " ".join(part.strip() for part in super().__str__().splitlines())


class ConfigError(VTPruneError, ValueError):
    """A value given by the user (budget, method, option, file) cannot be used."""


class UnsupportedModelError(VTPruneError, TypeError):
    """The model is of no supported family, or lacks a part that the method needs."""


class InputError(VTPruneError, ValueError):
    """The tensors of one call (images, masks, positions, cache) do not fit each other."""


class VTPruneWarning(UserWarning):
    """Something the user asked for did not happen, or happened differently; the message says why."""
