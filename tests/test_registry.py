# SPDX-License-Identifier: Apache-2.0
"""The table of methods: built-in ones, registered ones, and those of other packages."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from helpers import Declared, make_tokens
from torch import Tensor

from vtprune import registry
from vtprune.budget import Budget
from vtprune.errors import ConfigError, VTPruneWarning
from vtprune.registry import Pruner, build, methods, register
from vtprune.tokens import VisualTokens


@dataclass
class LastTokens(Declared):
    """What the fake package below provides."""

    step: int = 1

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.arange(len(tokens.features)) * self.step


@pytest.fixture(autouse=True)
def own_table() -> Iterator[None]:
    """Registrations of a test end with it."""
    before = dict(methods())
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)


def install(monkeypatch: pytest.MonkeyPatch, **entries: str) -> None:
    """Pretend that a package with these entry points is installed."""

    def entry_points(group: str) -> list[EntryPoint]:
        assert group == "vtprune.pruners"
        return [EntryPoint(name, value, group) for name, value in entries.items()]

    monkeypatch.setattr(registry, "entry_points", entry_points)


def test_the_built_in_methods_are_there_and_sorted() -> None:
    table = methods()
    assert {"random", "grid", "norm", "divprune", "idpruner"} <= set(table)
    assert list(table) == sorted(table)
    assert all(cls.name == name and issubclass(cls, Pruner) for name, cls in table.items())


def test_register_makes_a_method_known() -> None:
    assert register("last")(LastTokens) is LastTokens
    pruner = build("last", {"step": 2})
    assert isinstance(pruner, LastTokens) and pruner.name == "last" and pruner.step == 2
    selection = pruner.select(make_tokens([[[(2, 3)], [(1, 2)]]]), Budget(2))
    assert selection.order is not None and selection.order.tolist() == [5, 4, 7, 6]


def test_registering_twice_replaces_the_same_class_and_refuses_another() -> None:
    register("last")(LastTokens)
    again = dataclass(type("LastTokens", (Declared,), {"__module__": __name__, "__qualname__": "LastTokens"}))
    assert methods()["last"] is LastTokens
    register("last")(again)
    assert methods()["last"] is again
    for other in ({"__module__": "elsewhere", "__qualname__": "LastTokens"}, {"__module__": __name__}):
        with pytest.raises(ConfigError, match=r"'last' exists already .*choose another name"):
            register("last")(dataclass(type("Other", (Declared,), other)))
    with pytest.raises(ConfigError, match="'random' exists already"):
        register("random")(LastTokens)


@pytest.mark.parametrize("thing", [int, lambda: None, type("Plain", (Pruner,), {}), dataclass(type("No", (), {}))])
def test_register_takes_dataclasses_of_pruner_only(thing: Any) -> None:
    with pytest.raises(ConfigError, match="needs a dataclass that extends"):
        register("bad")(thing)
    assert "bad" not in methods()


GOOD = {"modality": ("image",), "mechanism": ("attention",), "query_aware": False, "training_free": True}
GOOD |= {"adaptive": False}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "one is missing": ({"adaptive": None}, "does not declare adaptive; give the class adaptive = ..., True or False"),
    "one is misspelt": ({"query_aware": None, "query_awre": True}, "does not declare query_aware, only 'query_awre';"),
    "an unknown word": ({"mechanism": ("atention",)}, "mechanism = ('atention',); write a tuple of 'transformation', "),
    "no tuple": ({"mechanism": "query"}, "mechanism = 'query'; write a tuple of 'transformation', 'similarity', "),
    "for nothing": ({"modality": ()}, "modality = (); write a tuple of 'image', 'video'"),
    "a list in it": ({"modality": (["image"],)}, "modality = (['image'],); write a tuple of 'image', 'video'"),
    "no switch": ({"training_free": "yes"}, "training_free = 'yes'; write True or False"),
    "a number": ({"adaptive": 1}, "adaptive = 1; write True or False"),
    "a question in one only": ({"query_aware": True}, "says so in both"),
    "a question in the other only": ({"mechanism": ("query",)}, "says so in both"),
}


def declaring(words: dict[str, Any]) -> Any:
    body = {key: value for key, value in {**GOOD, **words}.items() if value is not None}
    return dataclass(type("Mine", (Pruner,), {"__module__": __name__, **body}))


@pytest.mark.parametrize("what", BAD)
def test_a_method_that_declares_too_little_or_nonsense_is_told_in_one_line(what: str) -> None:
    words, expected = BAD[what]
    with pytest.raises(ConfigError) as caught:
        register("mine")(declaring(words))
    message = str(caught.value)
    assert expected in message and message.startswith("method 'mine' (Mine) ") and "\n" not in message
    assert "mine" not in methods()


def test_a_method_that_declares_everything_is_taken() -> None:
    assert register("mine")(declaring({})).mechanism == ("attention",)
    assert register("mine")(declaring({"mechanism": ()})).mechanism == ()
    assert register("mine")(declaring({"mechanism": ("query", "attention"), "query_aware": True})).query_aware


def test_a_method_of_another_package_that_forgets_one_is_named_in_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Declared, "adaptive")
    install(monkeypatch, far=f"{__name__}:LastTokens")
    with pytest.warns(VTPruneWarning, match=r"'far' .*was left out: .*does not declare adaptive"):
        assert "far" not in methods()


def test_what_the_built_in_methods_declare() -> None:
    """So that a change is meant: who rests on what, and that only one finds its own count."""
    table = methods()
    asking = {"catp", "cdpruner", "corematching", "fastv", "pyramiddrop", "selector", "sparsevlm", "spatten"}
    asking |= {"tokensparse"}
    assert {name for name, cls in table.items() if cls.query_aware} == asking
    assert all(cls.modality == ("image", "video") for cls in table.values())
    assert {name for name, cls in table.items() if not cls.training_free} == {"selector"}
    assert {name for name, cls in table.items() if cls.adaptive} == {"corematching"}
    found = {word: {n for n, cls in table.items() if word in cls.mechanism} for word in registry.DECLARED["mechanism"]}
    assert found == {
        "transformation": {"pool", "prumerge+", "sparsevlm", "tome", "visionzip"},
        "similarity": {
            "catp",
            "cdpruner",
            "dart",
            "divprune",
            "embedlens",
            "evs",
            "idpruner",
            "scope",
            "selector",
            "tome",
            "vidcom2",
            "vispruner",
            "zoo",
        },
        "attention": {"globalcom2", "hiprune", "idpruner", "prumerge+", "scope", "visionzip", "vispruner"},
        "query": asking,
    }
    assert {n for n, cls in table.items() if not cls.mechanism} == {
        *("frames", "grid", "norm", "random", "visual-exit", "worst")
    }


def test_a_pruner_must_override_something() -> None:
    @dataclass
    class Nothing(Declared):
        pass

    with pytest.raises(NotImplementedError, match="Nothing must override"):
        Nothing().select(make_tokens([[[(2, 2)]]]), Budget(0.5))


def test_methods_of_other_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, far=f"{__name__}:LastTokens")
    assert "far" in methods()
    pruner = build("far", {})
    assert isinstance(pruner, LastTokens) and pruner.name == "far"


def test_another_package_does_not_replace_a_built_in_method(monkeypatch: pytest.MonkeyPatch) -> None:
    before = methods()["random"]
    install(monkeypatch, random=f"{__name__}:LastTokens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert methods()["random"] is before


@pytest.mark.parametrize("value", ["no_such_package_of_pruners:X", f"{__name__}:no_such_class", "builtins:int"])
def test_a_broken_package_is_left_out_with_a_warning(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, broken=value, far=f"{__name__}:LastTokens")
    with pytest.warns(VTPruneWarning, match="'broken'.*was left out"):
        table = methods()
    assert "broken" not in table and {"far", "random"} <= set(table)


def test_no_warning_without_a_broken_package() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        methods()


@pytest.mark.parametrize(
    "name,hint", [("idprunner", "(did you mean 'idpruner'?)"), ("divprun", "(did you mean 'divprune'?)"), ("zzz", "")]
)
def test_an_unknown_method_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(name, {})
    message = str(caught.value)
    assert message.startswith(f"unknown method {name!r}") and hint in message and "known methods: catp, " in message
    assert ("did you mean" in message) == bool(hint)


@pytest.mark.parametrize(
    "method,option,expected",
    [
        ("idpruner", "mmr_lamda", "no option 'mmr_lamda' (did you mean 'mmr_lambda'?); its options are importance, "),
        ("random", "keep", "no option 'keep'; its options are seed"),
        ("norm", "seed", "no option 'seed'; it has no options"),
        ("random", "name", "no option 'name'"),
        ("random", 1, "no option 1;"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(method: str, option: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(method, {option: 1})
    assert expected in str(caught.value)
