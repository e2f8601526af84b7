# SPDX-License-Identifier: Apache-2.0
"""What goes to vLLM, and what is refused."""

from __future__ import annotations

import pytest

from vtprune import PruneConfig
from vtprune.errors import ConfigError
from vtprune.serving import vllm_flags


def test_flags_say_what_is_removed() -> None:
    flags = vllm_flags(PruneConfig(method="vidcom2", keep=0.25))
    assert flags == ["--video-pruning-rate", "0.75", "--video-pruning-method", "vidcom2"]
    assert vllm_flags(PruneConfig(method="evs", keep=0.7))[1] == "0.3"
    assert vllm_flags(PruneConfig(method="idpruner", keep=1.0)) == []


@pytest.mark.parametrize("keep", [1 / 9, 1 / 3, 0.1, 0.25, 2 / 9, 0.9, 1e-7])
def test_vllm_keeps_as_many_tokens(keep: float) -> None:
    rate = float(vllm_flags(PruneConfig(method="evs", keep=keep))[1])
    assert 0 <= rate < 1
    for total in (576, 640, 4096, 9000):
        assert int(total * (1 - rate)) == int(total * keep + 1e-6)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"method": "idpruner", "keep": 0.25}, "no method 'idpruner'"),
        ({"method": "evs", "keep": 64}, "not a fraction"),
        ({"method": "evs", "keep": 0.25, "allocation": "equal"}, "allocation"),
        ({"method": "vidcom2", "keep": 0.25, "scope": "joint"}, "scope"),
        ({"method": "evs", "keep": 0.25, "tower_keep": 0.5}, "tower_keep"),
    ],
)
def test_what_vllm_cannot_do_is_refused_in_one_line(config: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        vllm_flags(PruneConfig(**config))
    assert "\n" not in str(caught.value)
