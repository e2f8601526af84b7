# SPDX-License-Identifier: Apache-2.0
"""A few of the random cases, the same ones each time; `make fuzz` runs many (see `__main__`)."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

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
