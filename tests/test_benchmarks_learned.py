# SPDX-License-Identifier: Apache-2.0
"""What the tables of the learned methods count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from benchmarks.answers import Answers
from benchmarks.lora import MIB, WORDS, Saved, memory, pruned
from benchmarks.selector import compared, tabled


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


def test_the_mean_over_worlds_gives_each_an_equal_share_and_leaves_other_tasks_out(tmp_path: Path) -> None:
    """By hand: a has kinds x and y, b has kind z alone. Ours is right on 1/2 and 1 of a's kinds (3/4) and on 1/4 of
    b's, the other on 1/2 and 0 (1/4) and on 3/4: means 1/2 and 1/2, differences 1/2 and -1/2, so none."""
    ours, other = "selector weights=/x/mine.safetensors", "random"
    right = {
        "a": {"x": ((1, 1), (0, 0)), "y": ((1, 0), (1, 0))},
        "b": {"z": ((1, 1), (0, 1), (0, 1), (0, 0))},
        "easy-vqa": {"x": ((0, 1), (0, 1))},
    }
    found = {}
    for world, kinds in right.items():
        lines: list[dict[str, object]] = [
            {"type": "run", "device": "none", "torch": "2", "transformers": "5", "commit": "c"}
        ]
        order = [(ours, 0), (other, 1)] if world == "a" else [(other, 1), (ours, 0)]
        for kind, answers in kinds.items():
            for number, both in enumerate(answers):
                for method, at in order:
                    row = {"type": "answer", "id": f"{world}/{kind}/{number}", "kind": kind, "method": method}
                    row |= {"keep": "1/9", "correct": bool(both[at]), "tokens_out": 128 if world == "b" else 64}
                    lines.append(row)
        (tmp_path / f"{world}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        found[world] = Answers([tmp_path / f"{world}.jsonl"])
    rows = {(r["world"], r["kind"], r["method"]): r for r in tabled(found, "/x/mine.safetensors")}
    assert not any("/x" in method for _, _, method in rows)
    pooled = rows["pocketvqa", "all", other]
    assert (pooled["accuracy"], pooled["selector_minus"], pooled["n"], pooled["tokens"]) == (0.5, 0.0, 8, "96")
    assert rows["pocketvqa", "all", "selector weights=mine.safetensors"]["accuracy"] == 0.5
    # All of the doubt is of kind x (0 to 1 right alike, no difference) and of z, where ours lacks two of four answers.
    assert pooled["minus_low"] == pytest.approx(0.5 * (0.5 - 1.0), abs=1e-9) and pooled["minus_high"] == 0.25
    assert rows["a", "all", other]["selector_minus"] == 0.5 and ("easy-vqa", "all", other) in rows
