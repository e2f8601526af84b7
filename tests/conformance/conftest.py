# SPDX-License-Identifier: Apache-2.0
"""Makes the test-only pruners known for as long as a conformance test runs, and no longer; tiny models get a
calibration and a selector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from vtprune import registry
from vtprune.lens import Calibration
from vtprune.pruners import selector

from .helpers import TEST_PRUNERS


@pytest.fixture(autouse=True)
def _test_only_pruners() -> Iterator[None]:
    for name, cls in TEST_PRUNERS.items():
        registry.register(name)(cls)
    yield
    for name in TEST_PRUNERS:
        registry._METHODS.pop(name, None)


@pytest.fixture(autouse=True)
def _calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models have no calibration for `embedlens`: any words will do."""
    anchors = {"vit_sink": (7,), "dead": tuple(range(40, 60))}
    invented = Calibration("tiny", tiny.VOCABULARY, 32, anchors, excluded=(tiny.PAD, tiny.IMAGE, tiny.VIDEO))
    find = Calibration.find

    def found(checkpoint: str) -> Calibration:
        return find(checkpoint) if checkpoint else invented  # tiny models come from no folder

    monkeypatch.setattr(Calibration, "find", found)


@pytest.fixture(autouse=True)
def _selected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they have a selector: random weights will do."""
    torch.manual_seed(0)
    network = selector.Network(32).requires_grad_(False)
    find, load = selector.find, selector.load
    monkeypatch.setattr(selector, "find", lambda checkpoint: find(checkpoint) if checkpoint else Path("tiny"))
    monkeypatch.setattr(selector, "load", lambda path: network if path == Path("tiny") else load(path))
