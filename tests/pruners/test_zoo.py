# SPDX-License-Identifier: Apache-2.0
"""`zoo`: the estimators of sensitivity against each other and against Jacobians, its selection, what it can serve."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conformance.test_anyres import by_hand
from helpers import NoHostSync, make_tokens
from torch import Tensor, nn

import vtprune
from vtprune.budget import Budget
from vtprune.errors import ConfigError, UnsupportedModelError
from vtprune.kernels import reference
from vtprune.models.base import Family
from vtprune.pruners import zoo
from vtprune.registry import build
from vtprune.tokens import PRE_PROJECTOR, Selection, VisualTokens

F64 = torch.float64
#: The spec's vector: rows, sensitivities, and the order in which they are kept.
Z = torch.tensor([(1, 0), (0.8, 0.6), (0, 1), (0.6, 0.8)])
S = torch.tensor([4.0, 3, 2, 1])


class Projector(nn.Module):
    """A LLaVA projector: two layers and an activation, weights of a trained one's size."""

    def __init__(self, dim: int = 12, hidden: int = 20, out: int = 16, act: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear_1 = nn.Linear(dim, hidden)
        self.act = nn.GELU() if act is None else act
        self.linear_2 = nn.Linear(hidden, out)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(rows)))


class Merger(nn.Module):
    """A PatchMerger: a norm per row, four rows to one."""

    def __init__(self, dim: int = 12, out: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ln_q = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(4 * dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, out))

    def forward(self, rows: Tensor) -> Tensor:
        return self.mlp(self.ln_q(rows).view(-1, 4 * rows.shape[-1]))


def rows_of(n: int, dim: int = 12, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def jacobians(projector: nn.Module, rows: Tensor, group: int = 1) -> Tensor:
    """``[n, D, d_v]``: of each token, with respect to a step that all rows of its group take."""
    step = torch.zeros(rows.shape[1], dtype=rows.dtype)
    tokens = rows.split(group)
    return torch.stack([torch.func.jacrev(lambda s, t=t: projector(t + s)[0])(step) for t in tokens]).detach()


def encoded(
    projector: Any, raw: Tensor, group: int = 1, images: int = 1, features: Tensor | None = None
) -> VisualTokens:
    n = len(raw) // group // images
    if features is None:
        with torch.no_grad():
            features = projector(raw)
    tokens = make_tokens([[[(1, n)]]] * images, features=features)
    return dataclasses.replace(tokens, probes={PRE_PROJECTOR: raw}, projector=projector)


def order(selection: Selection) -> list[int]:
    assert selection.order is not None
    return selection.order.tolist()


def bank(m: int = 64, dim: int = 12) -> Tensor:
    return zoo.bank(dim, m, 0).double()


# -- sensitivity ------------------------------------------------------------------------------------------------------


def test_fd_is_the_formula_direction_by_direction() -> None:
    projector, rows = Projector().double(), rows_of(7)
    want = torch.zeros(7, dtype=F64)
    with torch.no_grad():
        for u in bank():
            want += (projector(rows + 0.01 * u) - projector(rows - 0.01 * u)).norm(dim=1) / 0.02 / 64
    torch.testing.assert_close(zoo.sensitivity(rows, projector, bank()), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("h", [0.01, 0.3])
@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.ReLU(), nn.GELU("tanh")], ids=str)
def test_fused_equals_faithful(act: nn.Module, h: float) -> None:
    projector, rows = Projector(act=act).double(), rows_of(50)
    fused = zoo.sensitivity(rows, projector, bank(), h, "fd_fused")
    assert float((fused - zoo.sensitivity(rows, projector, bank(), h, "fd")).abs().max()) < 1e-10


@pytest.mark.parametrize("projector,group", [(Projector(), 1), (Merger(), 4)], ids=["mlp", "merger"])
def test_fd_minus_jvp_shrinks_fourfold_when_h_halves(projector: nn.Module, group: int) -> None:
    projector, rows = projector.double(), rows_of(20)
    jvp = zoo.sensitivity(rows, projector, bank(), estimator="jvp", group=group)
    gaps = [zoo.sensitivity(rows, projector, bank(), h, "fd", group) - jvp for h in (0.08, 0.04, 0.02)]
    for large, small in itertools.pairwise(gaps):
        torch.testing.assert_close(large / small, torch.full_like(jvp, 4.0), rtol=0.05, atol=0)


@pytest.mark.parametrize("projector,group", [(Projector(), 1), (Merger(), 4)], ids=["mlp", "merger"])
def test_jvp_and_frobenius_against_exact_jacobians(projector: nn.Module, group: int) -> None:
    projector, rows = projector.double(), rows_of(20)
    exact = jacobians(projector, rows, group)
    jvp = zoo.sensitivity(rows, projector, bank(), estimator="jvp", group=group)
    torch.testing.assert_close(jvp, (exact @ bank().T).norm(dim=1).mean(1), rtol=1e-12, atol=0)
    frobenius = zoo.sensitivity(rows, projector, bank(), estimator="frobenius", group=group)
    assert float((frobenius - exact.flatten(1).norm(dim=1) / math.sqrt(12)).abs().max()) < 1e-12


@pytest.mark.parametrize("projector,group", [(Projector(), 1), (Merger(), 4)], ids=["mlp", "merger"])
@pytest.mark.parametrize("estimator", zoo.ESTIMATORS)
def test_in_fp32(estimator: str, projector: nn.Module, group: int) -> None:
    rows = rows_of(40, dtype=torch.float32)
    if estimator == "fd_fused" and group == 4:
        estimator = "jvp"
    got = zoo.sensitivity(rows, projector.float(), bank().float(), estimator=estimator, group=group)
    want = zoo.sensitivity(rows.double(), projector.double(), bank(), estimator=estimator, group=group)
    assert got.dtype == torch.float32
    rtol = {"fd": 5e-5, "fd_fused": 5e-6}.get(estimator, 1e-6)  # differences lose digits, "fd" more than "fd_fused"
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=0)
    projector.float()


def test_frobenius_ranks_as_the_estimate_does() -> None:
    projector, rows = Projector(64, 96, 80).double(), rows_of(200, 64)
    fd = zoo.sensitivity(rows, projector, bank(64, 64))
    frobenius = zoo.sensitivity(rows, projector, bank(64, 64), estimator="frobenius")
    assert zoo.spearman(fd, frobenius) > 0.95
    assert float((fd / frobenius - 1).abs().mean()) < 0.05


def test_relu_counts_its_active_units() -> None:
    # Directions along the axes: each changes one unit, by 1 if it is active. No kink within h.
    rows = rows_of(30)
    rows += 0.05 * rows.sign()
    got = zoo.sensitivity(rows, torch.relu, torch.eye(12, dtype=F64))
    torch.testing.assert_close(got, (rows > 0).double().mean(1), rtol=1e-12, atol=0)


def test_long_inputs_are_worked_off_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for projector, group in ((Projector().double(), 1), (Merger().double(), 4)):
        for estimator in ("fd", "jvp", "frobenius"):
            whole = zoo.sensitivity(rows_of(8), projector, bank(5), 0.01, estimator, group)
            monkeypatch.setattr(zoo, "BLOCK", 1)
            torch.testing.assert_close(
                zoo.sensitivity(rows_of(8), projector, bank(5), 0.01, estimator, group), whole, rtol=1e-12, atol=0
            )
            monkeypatch.undo()


def test_directions_are_seeded_unit_vectors() -> None:
    assert zoo.bank(12, 64, 0).shape == (64, 12) and zoo.bank(12, 64, 0).dtype == torch.float32
    torch.testing.assert_close(zoo.bank(12, 64, 0).norm(dim=1), torch.ones(64))
    torch.testing.assert_close(zoo.bank(12, 64, 7), zoo.bank.__wrapped__(12, 64, 7), rtol=0, atol=0)
    assert not torch.equal(zoo.bank(12, 64, 0), zoo.bank(12, 64, 1))


def test_global_generators_are_left_alone() -> None:
    tokens = encoded(Projector(), rows_of(9, dtype=torch.float32))
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    zoo.bank.cache_clear()
    build("zoo", {}).select(tokens, Budget(3))
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == state).all()


def test_half_precision_is_perturbed_in_fp32() -> None:
    # In bf16 the step of 0.01 along 12 axes would mostly be rounded away.
    projector, rows = Projector().bfloat16(), rows_of(30).bfloat16()
    want = zoo.sensitivity(rows.double(), Projector().bfloat16().double(), bank())
    for estimator in ("fd", "fd_fused"):
        with torch.autocast("cpu", torch.bfloat16):
            got = zoo.sensitivity(rows, projector, bank(), estimator=estimator)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)
    assert all(p.dtype == torch.bfloat16 for p in projector.parameters())


def test_frobenius_notices_new_weights() -> None:
    projector, rows = Projector().double(), rows_of(6)
    before = zoo.sensitivity(rows, projector, bank(), estimator="frobenius")
    assert torch.equal(zoo.sensitivity(rows, projector, bank(), estimator="frobenius"), before)
    with torch.no_grad():
        projector.linear_2.weight.mul_(3)
    torch.testing.assert_close(zoo.sensitivity(rows, projector, bank(), estimator="frobenius"), 3 * before)
    projector.load_state_dict(Projector().double().state_dict())
    torch.testing.assert_close(zoo.sensitivity(rows, projector, bank(), estimator="frobenius"), before)
    projector.float()
    assert zoo.sensitivity(rows.float(), projector, bank(), estimator="frobenius").dtype == torch.float32


def test_applying_again_notices_weights_that_changed_without_a_trace() -> None:
    projector, rows = Projector().double(), rows_of(6)
    before = zoo.sensitivity(rows, projector, bank(), estimator="frobenius")
    projector.linear_2.weight.data *= 3
    build("zoo", {"estimator": "frobenius"}).check_model(8, projector)
    torch.testing.assert_close(zoo.sensitivity(rows, projector, bank(), estimator="frobenius"), 3 * before)


def test_only_two_plain_layers_have_a_closed_form() -> None:
    class Adapted(nn.Linear):
        pass

    class Residual(Projector):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(12, 16)

    adapted = Projector()
    adapted.linear_1 = Adapted(12, 20)
    sequence = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 16))
    assert zoo.two_layers(Projector()) is not None and zoo.two_layers(sequence) is not None
    longer = nn.Sequential(*sequence, nn.GELU())
    for other in (adapted, Residual(), Merger(), longer, nn.Linear(12, 16), Projector(act=nn.PReLU()), torch.relu):
        assert zoo.two_layers(other) is None


# -- selection --------------------------------------------------------------------------------------------------------


def brute(features: Tensor, importance: Tensor) -> list[int]:
    """All rows in the order of choice, from the formula, in fp64."""
    unit = (features.double() / features.double().norm(dim=1, keepdim=True)).numpy()
    distance, left = 1 - unit @ unit.T, importance.double().numpy().copy()
    picks = [int(left.argmax())]
    while len(picks) < len(left):
        score = left * distance[:, picks].min(1)
        score[picks] = -np.inf
        picks.append(int(score.argmax()))
    return picks


def test_the_spec_vector() -> None:
    scores = zoo.normalise(S, [4])
    torch.testing.assert_close(scores, torch.tensor([1, 2 / 3, 1 / 3, 0]))
    assert reference.sads(Z, scores, [4], [4]).tolist() == [0, 2, 1, 3]
    assert [reference.sads(Z, scores, [4], [k]).tolist() for k in (1, 2, 3)] == [[0], [0, 2], [0, 2, 1]]


def test_the_spec_vector_through_the_pruner() -> None:
    # x -> x_0 * (x_1, x_2, ...), at rows (S, 0, 0, ...): what a direction changes is S times a number of its own.
    raw = torch.cat([S[:, None], torch.zeros(4, 5)], 1)
    tokens = encoded(lambda x: x[:, :1] * x[:, 1:], raw, features=Z)
    ruler = build("zoo", {}).score(tokens)
    torch.testing.assert_close(ruler / ruler[3], S)
    assert order(build("zoo", {}).select(tokens, Budget(4))) == [0, 2, 1, 3]


def test_against_the_formula_on_random_rows() -> None:
    for seed in range(50):
        features = rows_of(24, 6, seed, torch.float32)
        importance = torch.rand(24, generator=torch.Generator().manual_seed(seed))
        got = reference.sads(features, importance, [24], [23]).tolist()
        assert got == brute(features, importance)[:23]


def test_constant_sensitivity_is_farthest_points_from_the_first() -> None:
    for seed in range(200):
        features = rows_of(16, 4, seed, torch.float32)
        scores = zoo.normalise(torch.full((16,), 0.7), [16])
        assert scores.tolist() == [1.0] * 16
        seeded = torch.zeros(16)
        seeded[0] = 1
        assert torch.equal(
            reference.sads(features, scores, [16], [12]), reference.mmr(features, seeded, [16], [12], 0.0)
        )


@pytest.mark.parametrize("estimator", zoo.ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_projector_hits_the_constant_branch(dtype: torch.dtype, estimator: str) -> None:
    projector = Projector(act=nn.Identity()).double()
    scores = zoo.sensitivity(rows_of(40), projector, bank(), estimator=estimator)
    assert float(scores.max() - scores.min()) < 1e-12
    assert zoo.normalise(scores.float(), [40]).tolist() == [1.0] * 40
    # Rounding in fp32 tells tokens apart by more than one in a million. They are the same all the same.
    tokens = encoded(projector.to(dtype), rows_of(40).to(dtype))
    assert order(build("zoo", {"estimator": estimator}).select(tokens, Budget(1))) == [0]
    seeded = torch.zeros(40)
    seeded[0] = 1
    farthest = reference.mmr(tokens.features, seeded, [40], [9], 0.0).tolist()
    assert order(build("zoo", {"estimator": estimator}).select(tokens, Budget(9))) == farthest


def test_the_guard_is_relative_and_leaves_real_differences() -> None:
    scale = 1e-4
    torch.testing.assert_close(zoo.normalise(S * scale, [4]), torch.tensor([1, 2 / 3, 1 / 3, 0]), rtol=1e-4, atol=1e-4)
    assert zoo.normalise(torch.tensor([1, 1 + 5e-7]) * 1e5, [2]).tolist() == [1, 1]
    assert zoo.normalise(torch.tensor([1, 1 + 5e-6]) * 1e5, [2])[0] == 0
    assert zoo.normalise(torch.zeros(3), [3]).tolist() == [1, 1, 1]


def test_the_guard_grows_with_the_noise_but_not_with_one_outlier() -> None:
    noise = torch.tensor([5.0, 5, 5, math.nan])
    assert zoo.normalise(S, [4], noise).tolist() == [1.0] * 4
    outlier = torch.tensor([1e-4, 1e-4, 1e-4, 1e9])
    torch.testing.assert_close(zoo.normalise(S, [4], outlier), zoo.normalise(S, [4]))


def test_each_pool_has_its_own_scale() -> None:
    scores = zoo.normalise(torch.cat([S, 100 * S + 5, S[:1]]), [4, 0, 4, 1])
    torch.testing.assert_close(scores[:4], scores[4:8])
    assert scores[8] == 1


def test_broken_tokens_come_last_and_spoil_nobody() -> None:
    scores = zoo.normalise(torch.tensor([math.nan, *S.tolist(), math.inf]), [6])
    torch.testing.assert_close(scores[1:5], zoo.normalise(S, [4]))
    features = torch.cat([torch.ones(1, 2), Z, torch.ones(1, 2)])
    assert reference.sads(features, scores, [6], [6]).tolist() == [1, 3, 2, 4, 0, 5]
    features[2] = math.nan
    assert reference.sads(features, scores, [6], [6]).tolist() == [1, 3, 4, 0, 2, 5]
    raw = rows_of(9, dtype=torch.float32)
    raw[4] = math.nan
    picks = order(build("zoo", {}).select(encoded(Projector(), raw), Budget(9)))
    assert picks[-1] == 4 and sorted(picks) == list(range(9))


def test_copies_of_kept_tokens_are_taken_by_their_index() -> None:
    # Rows that rounding does not let be exact copies in fp32: 3 * x is one up to the last bit of its norm.
    raw = rows_of(5, 64, dtype=torch.float32)
    features = torch.cat([raw, raw * 3, raw * 7])
    importance = torch.linspace(1, 0.5, 15)
    picks = reference.sads(features, importance, [15], [15]).tolist()
    assert sorted(picks[:5]) == list(range(5)) and picks[5:] == list(range(5, 15))


def test_one_token_and_no_token() -> None:
    tokens = encoded(Projector(), rows_of(1, dtype=torch.float32))
    assert order(build("zoo", {}).select(tokens, Budget(1))) == [0]
    none = encoded(Projector(), rows_of(0, dtype=torch.float32))
    for estimator in zoo.ESTIMATORS:
        assert len(build("zoo", {"estimator": estimator}).select(none, Budget(3))) == 0


@pytest.mark.parametrize("projector,group", [(Projector(), 1), (Merger(), 4)], ids=["mlp", "merger"])
@pytest.mark.parametrize("estimator", zoo.ESTIMATORS)
def test_prefixes_and_no_wait_for_the_device(estimator: str, projector: nn.Module, group: int) -> None:
    tokens = encoded(projector.float(), rows_of(48 * group, dtype=torch.float32), group, images=2)
    pruner = build("zoo", {"estimator": estimator})
    full = torch.tensor(order(pruner.select(tokens, Budget(24)))).view(2, 24)
    with NoHostSync():
        picks = [pruner.select(tokens, Budget(k)) for k in (1, 7, 23)]
    for k, selection in zip((1, 7, 23), picks, strict=True):
        assert torch.tensor(order(selection)).view(2, k).tolist() == full[:, :k].tolist()


@pytest.mark.parametrize("projector,group", [(Projector(), 1), (Merger(), 4)], ids=["mlp", "merger"])
@pytest.mark.parametrize("estimator", zoo.ESTIMATORS)
def test_scores_are_the_same_alone_and_in_a_batch(estimator: str, projector: nn.Module, group: int) -> None:
    raw, pruner = rows_of(61 * group, dtype=torch.float32), build("zoo", {"estimator": estimator})
    tokens = encoded(projector.float(), raw, group)
    batch = dataclasses.replace(
        make_tokens([[[(1, 17)], [(1, 20)]], [], [[(2, 12)]]], features=tokens.features),
        probes=tokens.probes,
        projector=projector,
    )
    apart = []
    for start, n in ((0, 17), (17, 20), (37, 24)):
        apart.append(pruner.score(encoded(projector, raw[start * group : (start + n) * group], group)))
    assert pruner.score(batch).dtype == torch.float32
    assert torch.equal(pruner.score(batch), torch.cat(apart))


# -- in models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", zoo.ESTIMATORS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_served(family: str, estimator: str) -> None:
    model = tiny.build(family)
    tokens = vtprune.encode(model, tiny.collate(tiny.mixed(model)))
    pruner = build("zoo", {"estimator": estimator})
    group = 4 if family in tiny.QWEN else 1
    rows = tokens.probes[PRE_PROJECTOR].double()
    exact = jacobians(zoo._cast(tokens.projector, F64), rows, group)  # type: ignore[arg-type]
    directions = bank(64, rows.shape[1])
    want = (exact @ directions.T).norm(dim=1).mean(1)
    if estimator == "frobenius":
        want = exact.flatten(1).norm(dim=1) / math.sqrt(rows.shape[1])
    torch.testing.assert_close(pruner.score(tokens).double(), want, rtol=2e-3, atol=0)
    assert float(want.std() / want.mean()) > 0.01, "all alike, so this proves nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_through_apply(family: str, dtype: torch.dtype) -> None:
    model = tiny.build(family, dtype=dtype)
    batch = tiny.collate(tiny.mixed(model))
    dense = {name: p.clone() for name, p in model.named_parameters()}
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for estimator in zoo.ESTIMATORS:
            with mode(), vtprune.apply(model, "zoo", keep=0.25, estimator=estimator):
                assert model(**batch).logits.isfinite().all()
                fallback = family in tiny.QWEN and estimator == "fd_fused"
                assert vtprune.report(model).info == {"estimator": "jvp" if fallback else estimator}
    assert all(torch.equal(p, dense[name]) and p.dtype == dtype for name, p in model.named_parameters())


def test_anyres_views_have_quotas_and_newlines_stay() -> None:
    model = tiny.build("llava_next")
    sample = tiny.sample(model, [3, tiny.Image(60, 150), 6])
    tokens = vtprune.encode(model, sample)
    pruner = build("zoo", {})
    selection = pruner.select(tokens, Budget(0.25))
    # 60 x 150 pixels on 1 x 3 crops: 14 of 56 tokens, of which each view has its share by what unpadding left of it.
    assert tokens.seg_kind == ("thumbnail", "crop", "crop", "crop") and tokens.seqlens == (16, 12, 16, 12)
    assert selection.cu_seqlens.tolist() == [0, 4, 7, 11, 14]
    for start, n, k in ((0, 16, 4), (16, 12, 3), (28, 16, 4), (44, 12, 3)):
        # Each view by itself: its own scale, its own first pick.
        rows = slice(start, start + n)
        scores = zoo.normalise(pruner.score(tokens)[rows], [n])
        alone = reference.sads(tokens.features[rows], scores, [n], [k]) + start
        assert order(selection)[len(selection.index[selection.index < start]) :][:k] == alone.tolist()
    placeholders = int((sample["input_ids"] == tiny.IMAGE).sum())
    newlines = placeholders - len(by_hand(60, 150).visual)
    with vtprune.apply(model, "zoo", keep=0.25, restore=False), torch.no_grad():
        assert model(**sample).logits.shape[1] == 3 + 6 + newlines + 14
    assert newlines == 4  # one per row of the grid


def test_a_video_is_served_frame_by_frame() -> None:
    model = tiny.build("qwen2_5_vl")
    tokens = vtprune.encode(model, tiny.sample(model, [2, tiny.Video(3, 8, 12), 4]))
    assert vtprune.select(tokens, "zoo", keep=0.25).cu_seqlens.diff().tolist() == [6, 6, 6]


def test_threads_do_not_see_each_others_precision() -> None:
    merger, rows, wrong = Merger().bfloat16(), rows_of(64, dtype=torch.bfloat16), []

    def run() -> None:
        for _ in range(30):
            try:
                with torch.no_grad():
                    merger(rows)
            except RuntimeError as error:
                wrong.append(error)

    other = threading.Thread(target=run)
    other.start()
    for _ in range(30):
        zoo.sensitivity(rows, merger, bank(4), estimator="jvp", group=4)
    other.join()
    assert not wrong


def test_a_family_without_the_probe_is_refused_at_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava")
    monkeypatch.setattr(Family, "probe_hooks", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="'zoo' needs 'pre_projector'"):
        vtprune.apply(model, "zoo", keep=0.25)


def test_what_cannot_be_computed_says_so() -> None:
    with pytest.raises(ConfigError, match="needs the rows before the projector"):
        build("zoo", {}).select(make_tokens([[[(2, 2)]]]), Budget(2))
    with torch.device("meta"):
        offloaded = Projector()
    with pytest.raises(UnsupportedModelError, match=r"'linear_1.weight' are offloaded; load .* or choose"):
        zoo.sensitivity(rows_of(3), offloaded, bank())


@pytest.mark.parametrize(
    "option,value",
    [
        *(("estimator", v) for v in ("zo", None, ["fd"])),
        *(("m", v) for v in (0, -1, 1.0, True, "64", None)),
        *(("h", v) for v in (0, -0.1, math.nan, math.inf, True, "0.01", None)),
        *(("seed", v) for v in (-1, 0.5, True, None)),
        *(("diagnostics", v) for v in (1, "yes", None)),
    ],
    ids=repr,
)
def test_bad_options(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build("zoo", {option: value})
    message = str(caught.value)
    assert f"{option}={value!r}" in message and "\n" not in message and ("choose" in message or "give" in message)


# -- diagnostics ------------------------------------------------------------------------------------------------------


def test_spearman_by_hand() -> None:
    a = torch.tensor([10.0, 20, 30, 40])
    assert zoo.spearman(a, a**3) == pytest.approx(1) and zoo.spearman(a, -a) == pytest.approx(-1)
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    assert zoo.spearman(a, torch.tensor([2.0, 1, 4, 3])) == pytest.approx(0.6)
    # Ties: ranks 1.5 1.5 3.5 3.5; the correlation with 1 2 3 4 is 4 / sqrt(5 * 4).
    assert zoo.spearman(a, torch.tensor([1.0, 1, 2, 2])) == pytest.approx(4 / math.sqrt(20))
    assert zoo.spearman(torch.tensor([10, math.nan, 20, 30]), torch.tensor([3.0, 9, 2, 1])) == pytest.approx(-1)
    assert math.isnan(zoo.spearman(a, torch.ones(4))) and math.isnan(zoo.spearman(a[:1], a[:1]))


def test_diagnostics_in_the_report() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2)
    with torch.no_grad(), vtprune.apply(model, "zoo", keep=0.25, diagnostics=True):
        model(**sample)
        info = vtprune.report(model).info
    tokens = vtprune.encode(model, sample)
    found = build("zoo", {}).diagnose(tokens)  # type: ignore[attr-defined]
    assert len(found) == 2 and info["estimator"] == "fd_fused"
    for name in zoo.Diagnostics._fields:
        assert info[name] == f"{sum(getattr(d, name) for d in found) / 2:.3f}"


def test_diagnostics_say_what_they_should() -> None:
    rows = rows_of(60, dtype=torch.float32)
    # M(x) = x^2 / 2 on every axis: J = diag(x), so sensitivity follows the norm of x, and so, roughly, of M(x).
    square = encoded(lambda x: x.square() / 2, rows)
    [found] = build("zoo", {"m": 256}).diagnose(square)  # type: ignore[attr-defined]
    scores = build("zoo", {"m": 256}).score(square)
    assert found.spearman_norm == pytest.approx(zoo.spearman(scores, square.features.norm(dim=1)), abs=1e-3)
    assert found.spearman_norm > 0.7 and found.split_half > 0.9
    assert found.spread == pytest.approx(float(1 - scores.min() / scores.max()), rel=1e-4)
    # Few directions agree less.
    assert build("zoo", {"m": 2}).diagnose(square)[0].split_half < found.split_half  # type: ignore[attr-defined]
    for options in ({"m": 1}, {"estimator": "frobenius"}):
        assert math.isnan(build("zoo", options).diagnose(square)[0].split_half)  # type: ignore[attr-defined]
    selection = build("zoo", {"m": 1, "diagnostics": True}).select(square, Budget(3))
    assert selection.info["split_half"] == "nan" and float(selection.info["spearman_norm"]) > 0


def test_diagnostics_of_nothing() -> None:
    none = encoded(Projector(), rows_of(0, dtype=torch.float32))
    assert len(build("zoo", {"diagnostics": True}).select(none, Budget(3))) == 0
