# SPDX-License-Identifier: Apache-2.0
"""Versions of transformers: the one that was asked for runs, and one outside of the tested range is named."""

from __future__ import annotations

import os
import warnings

import pytest
import tiny
import transformers

import vtprune
from vtprune import compat
from vtprune.engine import attach
from vtprune.errors import VTPruneWarning


def test_the_version_that_was_asked_for_runs() -> None:
    """Set by `.ci/matrix`: an environment that finds another version must not pass for this one."""
    assert transformers.__version__ == os.environ.get("VTPRUNE_TRANSFORMERS", transformers.__version__)


def test_the_installed_version_is_in_the_tested_range() -> None:
    compat.check_transformers.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.check_transformers(transformers.__version__)


@pytest.mark.parametrize("version", ["4.56.2", "5.24.0", "6.0.0", "5.24.0.dev0"])
def test_versions_outside_of_the_range_are_named_once(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compat.check_transformers.cache_clear()
    monkeypatch.setattr(attach.transformers, "__version__", version)
    model = tiny.build("llava")
    with pytest.warns(VTPruneWarning, match=rf"transformers {version} is not among .*4\.57 to 5\.23"):
        vtprune.apply(model, "norm").remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = vtprune.apply(model, "norm")
    with pytest.warns(VTPruneWarning, match="never fired"):
        handle.remove()
    compat.check_transformers.cache_clear()


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6", "5.0.0", "5.17.0", "5.23.1"])
def test_versions_inside_of_the_range_are_not(version: str) -> None:
    compat.check_transformers.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.check_transformers(version)
