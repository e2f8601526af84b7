# SPDX-License-Identifier: Apache-2.0
"""`PruneConfig`: validated at construction, to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from vtprune.budget import Budget
from vtprune.config import CONFIG_NAME, PruneConfig
from vtprune.errors import ConfigError
from vtprune.pruners.idpruner import IDPruner
from vtprune.pruners.random import RandomPruner

CONFIGS = [
    PruneConfig(),
    PruneConfig("random", 128, options={"seed": 7}),
    PruneConfig("idpruner", 1 / 9, "compact", "joint", "pooled", False, {"importance": "norm", "mmr_lambda": 0.1}),
    PruneConfig("grid", 1.0),
    PruneConfig("grid", 1),
    PruneConfig("globalcom2", 0.5),
    PruneConfig(["norm", "idpruner"], 64, options={"mmr_lambda": 0.3}),
    PruneConfig(("norm", "globalcom2"), [0.5, 0.25]),
    PruneConfig("norm", layer=[3, 6]),
    PruneConfig("norm", tower_keep=0.5, tower_layer=7),
]


def test_defaults() -> None:
    config = PruneConfig()
    assert dataclasses.asdict(config) == {
        "method": "idpruner",
        "keep": 0.25,
        "positions": "original",
        "scope": "per_image",
        "allocation": "auto",
        "restore": True,
        "options": {},
        "compile": None,
        "layer": None,
        "tower_keep": 1.0,
        "tower_layer": None,
    }
    assert config.budget() == Budget(0.25) and config.pruner() == IDPruner()


def test_what_it_builds() -> None:
    config = PruneConfig("random", 9, scope="joint", allocation="pooled", options={"seed": 3})
    assert config.budget() == Budget(9, "joint", "pooled")
    assert config.pruner() == RandomPruner(3) and config.pruner() is not config.pruner()


def test_auto_is_the_allocation_of_the_method() -> None:
    assert PruneConfig("globalcom2").budget().allocation == "globalcom2"
    assert dataclasses.replace(PruneConfig("norm"), method="globalcom2").budget().allocation == "globalcom2"
    assert PruneConfig("globalcom2", allocation="equal").budget() == Budget(0.25)
    assert PruneConfig(["globalcom2", "norm"]).budget().allocation == "equal"
    assert PruneConfig(["norm", "globalcom2"]).budget().allocation == "globalcom2"


def test_several_methods() -> None:
    assert PruneConfig(["norm"]) == PruneConfig("norm")
    config = PruneConfig(["norm", "idpruner"], [0.5, 0.5])
    assert config.method == ("norm", "idpruner") and config.keep == (0.5, 0.5) and config.label == "norm + idpruner"
    assert config.budget() == Budget(0.25)
    assert PruneConfig(["norm", "idpruner"], [0.5, 64]).budget() == Budget(64)
    assert PruneConfig(["norm", "idpruner"], 0.25).budget() == Budget(0.25)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_json_and_back(config: PruneConfig, tmp_path: Path) -> None:
    again = PruneConfig.from_json(config.to_json())
    assert again == config and type(again.keep) is type(config.keep)
    assert PruneConfig.load(config.save(tmp_path / "mine.json")) == config
    assert config.save(tmp_path) == tmp_path / CONFIG_NAME
    assert PruneConfig.load(tmp_path) == PruneConfig.load(str(tmp_path / "vtprune.json")) == config


def test_missing_keys_take_their_defaults() -> None:
    assert PruneConfig.from_json('{"method": "grid"}') == PruneConfig("grid")


@pytest.mark.parametrize(
    "field,value",
    [
        *(("keep", v) for v in (0, -1, 1.5, math.nan, True, "0.5", None)),
        *(("method", v) for v in ("idprunner", "", None, 3, [], ["norm", 3], ["norm", "idprunner"])),
        *(("keep", v) for v in ([0.5, 0.5], (0.5,))),
        *(("positions", v) for v in ("Original", "", None, 1)),
        *(("scope", v) for v in ("image", None)),
        *(("allocation", v) for v in ("even", None)),
        *(("restore", v) for v in (1, None, "yes")),
        *(("options", v) for v in (None, [], "seed=1", {"sed": 1}, {1: 2}, {"mmr_lambda": 2.0})),
    ],
    ids=repr,
)
def test_bad_values_are_refused_in_one_line_with_a_cure(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        PruneConfig(**{field: value})
    message = str(caught.value)
    assert "\n" not in message
    assert any(cure in message for cure in ("give a", "choose one of", "must be", "known methods:", "its options are"))


def test_replace_validates_too() -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(PruneConfig(), keep=0)


@pytest.mark.parametrize(
    "text,expected",
    [
        ('{"metod": "norm"}', "unknown key 'metod' (did you mean 'method'?); known: method, keep"),
        ('{"zzz": 1}', "unknown key 'zzz'; known:"),
        ('{"method": "norm"', "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ("null", "holds a JSON NoneType"),
        ('{"keep": NaN}', "keep=nan"),
        ('{"keep": true}', "keep=True"),
        ('{"keep": 2.0}', "did you mean the count keep=2?"),
        ('{"method": "randon"}', "did you mean 'random'?"),
        ('{"method": "random", "options": {"seeds": 1}}', "did you mean 'seed'?"),
        ('{"method": "random", "options": {"seed": 1.5}}', "seed=1.5"),
    ],
)
def test_bad_files(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        PruneConfig.load(path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot read the config .*PruneConfig.save"):
            PruneConfig.load(path)
    (tmp_path / "picture.json").write_bytes(b"\xff\xfe\x00\x89")
    with pytest.raises(ConfigError, match="cannot read the config"):
        PruneConfig.load(tmp_path / "picture.json")


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    data = json.loads(PruneConfig("random", 64).save(tmp_path).read_text(encoding="utf-8"))
    assert data["method"] == "random" and data["keep"] == 64
