# SPDX-License-Identifier: Apache-2.0
"""JSON that others wrote."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises
    ------
    ValueError
        It is no JSON, or nested more deeply than Python can follow (which `json` reports as another error).
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
