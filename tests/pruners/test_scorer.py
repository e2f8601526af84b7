# SPDX-License-Identifier: Apache-2.0
"""The trained scorer and the soft top-k, and IDPruner with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import make_tokens
from safetensors.torch import save_file
from torch import Tensor

from vtprune.budget import Budget
from vtprune.errors import ConfigError
from vtprune.pruners import scorer as scorers
from vtprune.pruners.scorer import Scorer, load, soft_topk, soften
from vtprune.registry import build


def saved(folder: Path, width: int = 8, **more: Tensor) -> str:
    torch.manual_seed(0)
    path = folder / f"scorer-{width}-{len(more)}.safetensors"
    save_file({**Scorer(width).state_dict(), **more}, path)
    return str(path)


def test_scores_are_those_of_the_n_by_n_matrix() -> None:
    torch.manual_seed(0)
    scorer, rows = Scorer(12).double(), torch.randn(30, 12, dtype=torch.float64)
    for part, found in zip(rows.split([18, 12]), scorer(rows, [18, 12]).split([18, 12]), strict=True):
        matrix = scorer.query(part) @ scorer.key(part).T / 6**0.5
        torch.testing.assert_close(found, matrix.mean(1))


def test_a_broken_row_does_not_spoil_the_others() -> None:
    torch.manual_seed(0)
    scorer, rows = Scorer(8), torch.randn(6, 8)
    broken = torch.cat([rows, torch.full((1, 8), torch.nan)])
    found = scorer(broken, [7])
    assert found[6].isnan() and torch.equal(found[:6], scorer(rows, [6]))


@pytest.mark.parametrize("count", [0.5, 3, 7.25, 9.9])
def test_soft_topk_sums_to_its_count_and_keeps_the_order(count: float) -> None:
    scores = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    member = soft_topk(scores, count)
    torch.testing.assert_close(member.sum(-1), torch.full((4,), float(count), dtype=torch.float64))
    assert torch.equal(member.argsort(-1), scores.argsort(-1)) and (member > 0).all() and (member < 1).all()


def test_soft_topk_has_the_gradient_of_its_threshold_too() -> None:
    scores = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, 2.5), scores)
    # A shift of all scores changes nothing, so the gradient of any output sums to zero.
    (gradient,) = torch.autograd.grad(soft_topk(scores, 2.5)[0, 0], scores)
    assert abs(float(gradient.sum())) < 1e-9 and float(gradient.abs().sum()) > 0


def test_softening_is_per_pool_and_leaves_broken_scores() -> None:
    scores = torch.randn(15)
    scores[4] = torch.nan
    both = soften(scores, [10, 0, 5])
    assert torch.equal(both[10:], soften(scores[10:], [5])) and both[4].isnan()
    torch.testing.assert_close(both[10:].sum(), torch.tensor(1.0))


def test_idpruner_keeps_what_the_scorer_likes(tmp_path: Path) -> None:
    tokens, path = make_tokens([[[(5, 5)]], [[(3, 4)], [(2, 2)]]]), saved(tmp_path)
    pruner = build("idpruner", {"importance": "scorer", "scorer": path, "mmr_lambda": 1.0})
    selection = pruner.select(tokens, Budget(3))
    scores = load(path)(tokens.features, tokens.seqlens)
    expected = torch.cat(
        [part.topk(3).indices + at for part, at in zip(scores.split([25, 12, 4]), (0, 25, 37), strict=True)]
    )
    assert selection.order is not None and selection.order.tolist() == expected.tolist()
    assert selection.info == {"importance": "scorer"} and not pruner.training_free
    assert build("idpruner", {}).training_free


def test_norms_agree_where_importance_decides_alone_and_differ_in_between() -> None:
    tokens = make_tokens([[[(8, 8)]]], dim=4, cls_row=True)
    for lam, same in ((1.0, True), (0.5, False)):
        raw, soft = (
            build("idpruner", {"importance": "cls", "mmr_lambda": lam, "importance_norm": norm}).select(
                tokens, Budget(30)
            )
            for norm in ("raw_minmax", "soft_topk_minmax")
        )
        assert torch.equal(raw.order, soft.order) is same, lam


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"importance": "scorer"}, "needs the path"),
        ({"scorer": "x.safetensors"}, "do not go together"),
        ({"importance": "scorer", "scorer": "nowhere.safetensors"}, "there is no scorer nowhere.safetensors"),
        ({"importance_norm": "softmax"}, "raw_minmax, soft_topk_minmax"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build("idpruner", options)


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"more\.weight"):
        load(saved(tmp_path, **{"more.weight": torch.ones(1)}))
    short = tmp_path / "short.safetensors"
    short.write_bytes(Path(saved(tmp_path)).read_bytes()[:100])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        load(str(short))
    pruner = build("idpruner", {"importance": "scorer", "scorer": saved(tmp_path, 16)})
    with pytest.raises(ConfigError, match="width 16, this model's have 8"):
        pruner.select(make_tokens([[[(3, 3)]]]), Budget(2))


def test_a_folder_or_the_name_of_a_model_stands_for_the_scorer_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorers, "SHIPPED", tmp_path)
    with pytest.raises(ConfigError, match=r"there is no scorer pocket-x; give the path of a safetensors file$"):
        load("pocket-x")
    file = tmp_path / "pocket-x" / scorers.FILE
    file.parent.mkdir()
    Path(saved(tmp_path)).rename(file)
    expected = load(str(file)).state_dict()
    for name in ("pocket-x", str(file.parent)):
        assert all(torch.equal(v, expected[k]) for k, v in load(name).state_dict().items())
    with pytest.raises(ConfigError, match=r"no scorer pocket-y; .*, or the name of a model that ships.*: pocket-x"):
        load("pocket-y")
    pruner = build("idpruner", {"importance": "scorer", "scorer": "pocket-x"})
    assert len(pruner.select(make_tokens([[[(3, 3)]]]), Budget(2))) == 2


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    tokens, path = make_tokens([[[(6, 6)]]]), saved(tmp_path)

    def kept() -> Tensor:
        return (
            build("idpruner", {"importance": "scorer", "scorer": path, "mmr_lambda": 1.0})
            .select(tokens, Budget(9))
            .index
        )

    before = kept()
    save_file({name: -tensor if "query" in name else tensor for name, tensor in load(path).state_dict().items()}, path)
    assert not torch.equal(kept(), before)  # the scores have turned round
