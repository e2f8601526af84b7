# SPDX-License-Identifier: Apache-2.0
"""Makes the test-only pruners known for as long as a conformance test runs, and no longer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vtprune import registry

from .helpers import TEST_PRUNERS


@pytest.fixture(autouse=True)
def _test_only_pruners() -> Iterator[None]:
    for name, cls in TEST_PRUNERS.items():
        registry.register(name)(cls)
    yield
    for name in TEST_PRUNERS:
        registry._METHODS.pop(name, None)
