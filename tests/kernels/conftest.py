# SPDX-License-Identifier: Apache-2.0
"""What tests of kernels share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of what no kernel may read, and no result may show."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(out: Tensor) -> Tensor:
        return out.fill_(math.nan if out.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: filled(empty_like(*a, **k)))
