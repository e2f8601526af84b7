# SPDX-License-Identifier: Apache-2.0
"""A pocket model, loaded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune


@pytest.fixture(scope="session")
def pocket() -> tuple[Any, Any]:
    return vtprune.load("pocket-llava", device="cpu", dtype=torch.float32)
