# SPDX-License-Identifier: Apache-2.0
"""A few of the random cases, the same ones each time; `make fuzz` runs many (see `__main__`)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import __main__ as fuzz
from . import choices, prompts, readers

slow_to_draw = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@settings(max_examples=70, suppress_health_check=slow_to_draw)
@given(choices.cases())
def test_choices(case: choices.Case) -> None:
    choices.check(case)


@pytest.mark.filterwarnings("ignore::vtprune.errors.VTPruneWarning")
@settings(max_examples=6, suppress_health_check=slow_to_draw)
@given(prompts.cases())
def test_prompts(case: prompts.Case) -> None:
    prompts.check(case)


@settings(max_examples=250, suppress_health_check=slow_to_draw)
@given(readers.cases())
def test_readers(case: readers.Case) -> None:
    readers.check(case)


def test_what_makes_a_failure_small_is_no_case(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def check(case: int) -> None:
        seen.append(case)
        assert case < 1000

    monkeypatch.setitem(fuzz.KINDS, "numbers", (lambda: st.integers(0, 10**6), check, 50, 1.0))
    row = fuzz.chunk("numbers", 3, 50)
    first = next(i for i, case in enumerate(seen) if case >= 1000)
    assert row["failure"] and len(seen) > first + 1
    assert row["cases"] == first + 1 and row["outcomes"].get("ran", 0) == first and row["outcomes"]["failed"] == 1
    monkeypatch.setitem(fuzz.KINDS, "numbers", (lambda: st.integers(0, 999), check, 50, 1.0))
    row = fuzz.chunk("numbers", 3, 50)
    assert row["cases"] == 50 and row["failure"] is None and "outcomes" not in row


def test_no_method_is_left_out() -> None:
    assert {"selector", "spatten", "tokensparse", "norm"} <= set(prompts.METHODS)
    assert "selector" in choices.METHODS


def test_a_picture_without_tokens_beside_one_that_loses_some() -> None:
    pictures = (choices.Picture("image", (0, 0), (1, 1)),), (choices.Picture("anyres", (1, 1), (1, 1)),)
    choices.check(
        choices.Case(
            "embedlens", {"mode": "drop"}, 1.0, "per_image", "auto", pictures, 1, torch.float32, "random", False, 0,
            None, 0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test_what_sits_out_is_held_to_its_own_reference(family: str) -> None:
    samples = ((1, prompts.SIZES[family][1], 0, 2), (2, prompts.SIZES[family][0], 1))
    case = prompts.Case(
        family, torch.float32, "tokensparse", 0.5, "original", "per_image", "auto", samples, "left", True, 0, None, 0
    )
    assert prompts.check(case) == "ran"
