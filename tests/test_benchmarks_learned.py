# SPDX-License-Identifier: Apache-2.0
"""What the tables of the learned methods count."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from benchmarks.lora import MIB, WORDS, Saved, memory, pruned
from benchmarks.selector import compared


def test_saved_memory_by_hand() -> None:
    """``relu(x W).sum()``: autograd holds x (for the gradient of W) and the output of relu; W is the model's own."""
    model = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8)
    with Saved(model) as saved:
        out = torch.relu(model(x))
        out.relu().sum()  # the second relu holds its own output
    assert saved.mib * MIB == 4 * (16 * 8 + 2 * 16 * 4)


def test_memory_falls_with_the_tokens_and_gradients_flow() -> None:
    model = tiny.build("llava").requires_grad_(False)
    for layer in tiny.decoder(model).layers:
        layer.mlp.down_proj.weight.requires_grad_(True)
    sample = tiny.prompt(model, 2)
    sample["labels"] = sample["input_ids"].clone()
    rows = sample["input_ids"].shape[1]
    dense, half = (memory(model, sample, *how) for how in (("dense", "1"), ("random", "1/2")))
    # What grows with the square of the rows, and logits at the length of the input, keep the ratio from being exact.
    assert (rows - 20) / rows * 0.6 < half / dense < (rows - 12) / rows
    with pruned(model, "random", "1/2"):
        model(**sample).loss.backward()
    assert all(bool(layer.mlp.down_proj.weight.grad.abs().sum() > 0) for layer in tiny.decoder(model).layers)
    assert len(WORDS) == 14 == len(set(WORDS.values()))


def test_differences_are_ours_minus_theirs_at_the_same_budget() -> None:
    correct = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0], [0, 0, 0]], bool)
    columns = [("ours", "1/9", 64.0), ("other", "1/9", 64.0), ("other", "1/18", 32.0)]
    rows = compared(correct, ["a", "b", "a", "b"], columns, "ours", {"world": "w"}, {"gpu": "none"}, "ours")
    found = {(row["kind"], row["method"], row["keep"]): row for row in rows}
    assert len(rows) == 9 and found["a", "ours", "1/9"]["accuracy"] == 1.0
    assert found["all", "other", "1/9"]["ours_minus"] == pytest.approx(0.25)
    assert found["b", "other", "1/9"]["ours_minus"] == pytest.approx(0.5)
    assert found["all", "other", "1/18"]["ours_minus"] == "" and found["all", "ours", "1/9"]["ours_minus"] == ""
