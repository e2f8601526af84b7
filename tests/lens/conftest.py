# SPDX-License-Identifier: Apache-2.0
"""A pocket model, loaded once, and a calibration for the tiny models, which have none of their own."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import vtprune
from vtprune.lens import Calibration


@pytest.fixture(scope="session")
def pocket() -> tuple[Any, Any]:
    return vtprune.load("pocket-llava", device="cpu", dtype=torch.float32)


@pytest.fixture
def invented() -> Calibration:
    """Anchors at random: about half of the tokens of a tiny model are in some class."""
    anchors = {"vit_sink": (7, 8), "llm_sink": (30,), "dead": tuple(range(40, 60))}
    return Calibration("tiny", tiny.VOCABULARY, 32, anchors, excluded=(tiny.PAD, tiny.IMAGE, tiny.VIDEO))
