# SPDX-License-Identifier: Apache-2.0
"""`idpruner` and the sources of importance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import make_tokens

from vtprune.budget import Budget
from vtprune.errors import ConfigError
from vtprune.pruners import importance
from vtprune.registry import build
from vtprune.tokens import CLS_LOGITS, CLS_ROW, Selection

T1 = torch.tensor([(1, 0), (0.8, 0.6), (0, 1), (0.6, 0.8)])
T1_IMPORTANCE = torch.tensor([1, 0.9, 0.5, 0])


def order(selection: Selection) -> list[int]:
    assert selection.order is not None
    return selection.order.tolist()


@pytest.mark.parametrize("lam,expected", [(1, [0, 1, 2]), (0.9, [0, 1, 2]), (0.5, [0, 2, 1]), (0, [0, 2, 1])], ids=str)
def test_vector_t1_through_the_pruner(lam: float, expected: list[int]) -> None:
    # The importance is shifted and scaled on its way in: normalisation must undo it.
    tokens = make_tokens([[[(2, 2)]]], features=T1, cls_row=T1_IMPORTANCE * 30 - 7)
    assert order(build("idpruner", {"mmr_lambda": lam}).select(tokens, Budget(3))) == expected


def test_default_is_lambda_one_half_one_by_one() -> None:
    tokens = make_tokens([[[(2, 2)]]], features=T1, cls_row=T1_IMPORTANCE)
    assert order(build("idpruner", {}).select(tokens, Budget(3))) == [0, 2, 1]
    assert order(build("idpruner", {"parallel_k": 3}).select(tokens, Budget(3))) == [0, 1, 2]


def test_importance_is_normalised_in_each_pool() -> None:
    # The second image repeats the first with importance a hundred times smaller: it must choose alike, which a
    # normalisation over both would not do.
    tokens = make_tokens(
        [[[(2, 2)], [(2, 2)]]],
        features=T1.repeat(2, 1),
        cls_row=torch.cat([100 * T1_IMPORTANCE, T1_IMPORTANCE]),
    )
    assert order(build("idpruner", {"mmr_lambda": 0.9}).select(tokens, Budget(3))) == [0, 1, 2, 4, 5, 6]
    # Over the prompt they compete, as in the paper.
    joint = order(build("idpruner", {"mmr_lambda": 1.0}).select(tokens, Budget(2, scope="joint")))
    assert joint == [0, 1, 2, 4]


def test_cls_is_used_where_there_is_one() -> None:
    tokens = make_tokens([[[(5, 5)]]], cls_row=True)
    tokens = tokens.with_probes({CLS_LOGITS: torch.randn(25)})
    auto = build("idpruner", {}).select(tokens, Budget(6))
    logits = build("idpruner", {"importance": "cls_logits"}).select(tokens, Budget(6))
    cls = build("idpruner", {"importance": "cls"}).select(tokens, Budget(6))
    assert auto.info == logits.info == {"importance": "cls_logits"} and order(auto) == order(logits)
    assert order(auto)[0] == int(tokens.probes[CLS_LOGITS].argmax())
    assert cls.info == {"importance": "cls"} and order(cls)[0] == int(tokens.probes[CLS_ROW].argmax())


def test_without_cls_auto_falls_back_and_cls_is_an_error() -> None:
    tokens = make_tokens([[[(5, 5)]]])
    selection = build("idpruner", {}).select(tokens, Budget(6))
    assert selection.info == {"importance": "minus_cosine_to_mean"}
    cosines = torch.cosine_similarity(tokens.features, tokens.features.mean(0), dim=1)
    assert order(selection)[0] == int(cosines.argmin())
    with pytest.raises(ConfigError, match=r"importance='cls' needs .* use 'auto'"):
        build("idpruner", {"importance": "cls"}).select(tokens, Budget(6))


def test_norm_importance() -> None:
    tokens = make_tokens([[[(5, 5)]]], cls_row=True)
    selection = build("idpruner", {"importance": "norm"}).select(tokens, Budget(6))
    assert selection.info == {"importance": "norm"}
    assert order(selection)[0] == int(tokens.features.norm(dim=1).argmax())


@pytest.mark.parametrize(
    "source,needs,wants",
    [
        ("cls", {CLS_ROW}, set()),
        ("cls_logits", {CLS_LOGITS}, set()),
        ("auto", set(), {CLS_LOGITS}),
        ("norm", set(), set()),
    ],
)
def test_which_probes_are_asked_for(source: str, needs: set[Any], wants: set[Any]) -> None:
    pruner = build("idpruner", {"importance": source})
    assert pruner.needs == needs and pruner.wants == wants


def test_a_new_source_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_first(tokens: Any) -> tuple[torch.Tensor, str]:
        return torch.arange(len(tokens.features)), "mine"

    monkeypatch.setitem(importance.SOURCES, "mine", last_first)
    selection = build("idpruner", {"importance": "mine", "mmr_lambda": 1.0}).select(
        make_tokens([[[(2, 3)]]]), Budget(2)
    )
    assert order(selection) == [5, 4] and selection.info == {"importance": "mine"}


def test_cosine_to_the_mean_is_per_image() -> None:
    tokens = make_tokens([[[(3, 3)], [(2, 2), (2, 3)]]])
    scores, _ = importance.minus_cosine_to_mean(tokens)
    for rows in (slice(0, 9), slice(9, 19)):
        features = tokens.features[rows].double()
        expected = -torch.cosine_similarity(features, features.mean(0), dim=1)
        torch.testing.assert_close(scores[rows].double(), expected, rtol=0, atol=1e-6)


def test_a_broken_token_spoils_no_other_score() -> None:
    tokens = make_tokens([[[(3, 3)]]])
    sound = make_tokens([[[(2, 4)]]], features=tokens.features[1:].clone())
    tokens.features[0] = torch.tensor(float("inf"))
    scores, _ = importance.minus_cosine_to_mean(tokens)
    torch.testing.assert_close(scores[1:], importance.minus_cosine_to_mean(sound)[0])
    assert not scores[0].isfinite()


@pytest.mark.parametrize("source", ["cls", "norm", "minus_cosine_to_mean"])
def test_scores_are_fp32(source: str) -> None:
    features = torch.randn(9, 4).to(torch.float16)
    tokens = make_tokens([[[(3, 3)]]], features=features, cls_row=torch.rand(9).half())
    assert getattr(importance, source)(tokens)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "option,value",
    [
        ("importance", "clip"),
        ("importance", None),
        ("importance", ["cls"]),
        *(("mmr_lambda", v) for v in (-0.1, 1.1, math.nan, math.inf, True, "0.5", None)),
        *(("parallel_k", v) for v in (0, -1, 1.0, math.nan, True, "2", None)),
    ],
    ids=repr,
)
def test_bad_options(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build("idpruner", {option: value})
    message = str(caught.value)
    assert f"{option}={value!r}" in message and "\n" not in message and ("choose" in message or "give" in message)
