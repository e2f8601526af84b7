# SPDX-License-Identifier: Apache-2.0
"""Makes the test-only pruners known for as long as a conformance test runs, and no longer; calibrates tiny models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny

from vtprune import registry
from vtprune.lens import Calibration

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
