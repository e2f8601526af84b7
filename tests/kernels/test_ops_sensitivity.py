# SPDX-License-Identifier: Apache-2.0
"""Sensitivity of a projector: kernels against PyTorch in fp64. The interpreter on a CPU, in full on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtprune.errors import InputError
from vtprune.kernels import sensitivity as op
from vtprune.kernels.sensitivity import Layers

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of NaN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
full = pytest.mark.gpu
GELU = nn.GELU()


class Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def problem(
    n: int = 5, d_v: int = 24, d_h: int = 70, d: int = 50, m: int = 3, dtype: torch.dtype = torch.float16,
    act: Any = GELU, device: str = DEVICE, seed: int = 0,
) -> tuple[Tensor, Layers, Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(device)

    layers = Layers(draw(d_h, d_v, scale=d_v**-0.5), draw(d_h, scale=0.3), act, draw(d, d_h, scale=d_h**-0.5))
    directions = nn.functional.normalize(torch.randn(m, d_v, generator=g), dim=1).to(device)
    return draw(n, d_v), layers, directions


def doubled(layers: Layers) -> Layers:
    bias = None if layers.bias is None else layers.bias.double()
    return Layers(layers.inner.double(), bias, layers.act, layers.outer.double())


def gram_of(layers: Layers) -> Tensor:
    a, b = layers.inner.double(), layers.outer.double()
    return (a @ a.T) * (b.T @ b)


def close(got: Tensor, expected: Tensor, within: float) -> None:
    assert got.dtype == torch.float32 and got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected.double(), rtol=within, atol=1e-7)


def check(x: Tensor, layers: Layers, directions: Tensor, h: float, within: float = 4e-3) -> Tensor:
    got = op.mean_change(x, layers, directions, h, backend="triton")
    close(got, op.reference_change(x.double(), doubled(layers), directions.double(), h), within)
    return got


# -- small, on any machine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [0.0, 0.01, 3.0])
def test_change_against_the_formula(h: float, poison: None) -> None:
    check(*problem(), h)


@pytest.mark.parametrize("act", [nn.SiLU(), nn.ReLU(), nn.GELU("tanh"), torch.tanh, Quick()], ids=lambda a: str(a)[:12])
def test_activations_known_and_unknown(act: Any) -> None:
    x, layers, directions = problem(n=2, d_h=20, d=20, m=2, act=act)
    check(x, layers, directions, 0.0 if isinstance(act, nn.ReLU) else 0.8)
    gram = gram_of(layers)
    got = op.mean_square_change(x, layers, gram.float(), backend="triton")
    close(got, op.reference_frobenius(x.double(), doubled(layers), gram), 2e-2)


def test_the_parabola_and_the_straight_line_agree_on_a_short_step(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layers, directions = problem(n=3)
    straight = op.mean_change(x, layers, directions, 0.01, backend="triton")
    monkeypatch.setattr(op, "STRAIGHT", 0.0)
    bent = op.mean_change(x, layers, directions, 0.01, backend="triton")
    close(bent, straight, 2e-3)
    assert not torch.equal(bent, straight)


def test_the_step_matters_where_the_activation_bends() -> None:
    x, layers, directions = problem(n=3)
    one, far = (op.mean_change(x, layers, directions, h, backend="triton") for h in (0.01, 3.0))
    assert ((one - far) / one).abs().max() > 0.02


def test_more_directions_than_a_tile() -> None:
    check(*problem(n=2, m=67, d_h=20, d=20), 0.01)


@pytest.mark.parametrize(("h", "d_h", "d"), [(0.0, 70, 50), (0.01, 200, 300), (3.0, 50, 70)])
def test_a_triangle_stands_for_the_second_layer(
    h: float, d_h: int, d: int, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_CHANGE", (32, 16, 32, 16, 4))  # several blocks of rows
    x, layers, directions = problem(n=3, d_h=d_h, d=d)
    factor = op.triangle(layers.outer)
    assert factor.shape == (min(d, d_h), d_h) and factor.dtype == layers.outer.dtype
    wide = factor.double()
    torch.testing.assert_close(wide.T @ wide, layers.outer.double().T @ layers.outer.double(), rtol=0, atol=5e-3)
    got = op.mean_change(x, layers._replace(outer=factor), directions, h, triangular=True, backend="triton")
    close(got, op.reference_change(x.double(), doubled(layers), directions.double(), h), 4e-3)
    # What is passed over is not read.
    factor.masked_fill_(torch.ones_like(factor).tril(-33).bool(), math.nan)
    assert torch.equal(
        op.mean_change(x, layers._replace(outer=factor), directions, h, triangular=True, backend="triton"), got
    )


def test_a_broken_row_spoils_only_itself(poison: None) -> None:
    x, layers, directions = problem(n=4)
    sound = op.mean_change(x, layers, directions, 0.01, backend="triton")
    x[1, 3] = math.nan
    broken = op.mean_change(x, layers, directions, 0.01, backend="triton")
    assert broken[1].isnan()
    keep = [0, 2, 3]
    assert torch.equal(broken[keep], sound[keep])


def test_frobenius(poison: None) -> None:
    x, layers, _ = problem(d_h=72)
    gram = gram_of(layers)
    got = op.mean_square_change(x, layers, gram.float(), backend="triton")
    close(got, op.reference_frobenius(x.double(), doubled(layers), gram), 1e-2)
    x[1, 3] = math.nan
    broken = op.mean_square_change(x, layers, gram.float(), backend="triton")
    assert broken[1].isnan()
    assert torch.equal(broken[[0, 2, 3, 4]], got[[0, 2, 3, 4]])


def test_frobenius_over_several_blocks_and_of_other_dtypes(monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    monkeypatch.setattr(op, "_FORM", (32, 32, 16, 4, 2))
    monkeypatch.setattr(op, "_SLOPE", (16, 32, 16, 4, 2))
    for d_h in (64, 70):
        x, layers, _ = problem(n=37, d_h=d_h, d_v=20)
        gram = gram_of(layers)
        want = op.reference_frobenius(x.double(), doubled(layers), gram)
        close(op.mean_square_change(x, layers, gram.float(), backend="triton"), want, 1e-2)
        # fp32 rows go another way.
        close(op.mean_square_change(x.float(), layers, gram.float(), backend="triton"), want, 1e-2)
        alone = op.mean_square_change(x[3:4], layers, gram.float(), backend="triton")
        assert torch.equal(alone, op.mean_square_change(x, layers, gram.float(), backend="triton")[3:4])


def test_no_rows_and_what_does_not_fit() -> None:
    x, layers, directions = problem()
    assert op.mean_change(x[:0], layers, directions, 0.01, backend="triton").shape == (0,)
    assert op.mean_square_change(x[:0], layers, gram_of(layers), backend="triton").shape == (0,)
    with pytest.raises(InputError, match="directions"):
        op.mean_change(x, layers, directions[:, :5], 0.01)
    with pytest.raises(InputError, match="h=-1"):
        op.mean_change(x, layers, directions, -1.0)
    with pytest.raises(InputError, match="gram"):
        op.mean_square_change(x, layers, torch.zeros(3, 3))
    with pytest.raises(InputError, match="do not fit"):
        op.mean_change(x[:, :4], layers, directions[:, :4], 0.01)


# -- in full, on a GPU -------------------------------------------------------------------------------------------------


@full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 127, 131, 577])
@pytest.mark.parametrize("h", [0.0, 0.01, 2.0])
def test_odd_sizes(n: int, dtype: torch.dtype, h: float, poison: None) -> None:
    check(*problem(n, 200, 1000, 577, 64, dtype), h, 2e-3)


@full
@pytest.mark.parametrize("m", [1, 17, 64, 100])
@pytest.mark.parametrize("d_h", [64, 77, 1030])
def test_widths_and_directions(m: int, d_h: int) -> None:
    x, layers, directions = problem(33, 64, d_h, 131, m, torch.bfloat16)
    check(x, layers, directions, 0.01, 5e-3)
    gram = gram_of(layers)
    got = op.mean_square_change(x, layers, gram.float(), backend="triton")
    close(got, op.reference_frobenius(x.double(), doubled(layers), gram), 1e-2)


@full
def test_no_bias_strided_rows_and_transposed_weights() -> None:
    x, layers, directions = problem(60, 128, 256, 128, 64, torch.bfloat16)
    layers = Layers(layers.inner.T.contiguous().T, None, layers.act, layers.outer.T.contiguous().T)
    check(x[::3], layers, directions, 0.01, 3e-3)
    wide = torch.zeros(60, 256, dtype=x.dtype, device=x.device)
    wide[:, ::2] = x
    assert torch.equal(
        check(wide[:, ::2], layers, directions, 0.01, 3e-3)[::3], check(x[::3], layers, directions, 0.01)
    )


@full
@pytest.mark.parametrize("h", [0.0, 0.01, 2.0])
def test_the_same_alone_in_a_batch_and_again(h: float) -> None:
    x, layers, directions = problem(300, 256, 512, 512, 64, torch.bfloat16)
    got = op.mean_change(x, layers, directions, h)
    assert torch.equal(got, op.mean_change(x, layers, directions, h))
    close(op.mean_change(x[7:8], layers, directions, h), got[7:8], 2e-4)
    gram = gram_of(layers).bfloat16()
    got = op.mean_square_change(x, layers, gram)
    assert torch.equal(got, op.mean_square_change(x, layers, gram))
    close(op.mean_square_change(x[7:8], layers, gram), got[7:8], 2e-4)


@full
@pytest.mark.parametrize("m", [16, 32, 64])
@pytest.mark.parametrize("h", [0.0, 0.01, 2.0])
def test_no_tile_is_overwritten_while_it_is_read(m: int, h: float) -> None:
    """A race shows now and then only: many runs, with other work in between."""
    x, layers, directions = problem(300, 128, 4096, 512, m, torch.bfloat16)
    first = check(x, layers, directions, h, 6e-3)
    for _ in range(40):
        torch.randn(1 << 22, device=x.device)
        assert torch.equal(op.mean_change(x, layers, directions, h, backend="triton"), first)


@full
def test_no_op_waits_and_a_graph_replays() -> None:
    x, layers, directions = problem(65, 64, 128, 128, 64, torch.bfloat16)
    gram = gram_of(layers).bfloat16()

    def both() -> tuple[Tensor, Tensor]:
        return op.mean_change(x, layers, directions, 0.01), op.mean_square_change(x, layers, gram)

    both()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    x.copy_(problem(65, 64, 128, 128, 64, torch.bfloat16, seed=1)[0])
    graph.replay()
    for a, b in zip(captured, both(), strict=True):
        assert torch.equal(a, b)


@full
def test_rows_beyond_two_to_the_31() -> None:
    x, layers, directions = problem(300, 16, 1024, 32, 1, torch.bfloat16)
    many = x.repeat((1 << 21) // 300 + 2, 1)
    gram = gram_of(layers).bfloat16()
    close(op.mean_square_change(many, layers, gram)[-300:], op.mean_square_change(x, layers, gram), 2e-4)
    close(op.mean_change(many, layers, directions, 0.01)[-300:], op.mean_change(x, layers, directions, 0.01), 2e-4)


@full
@pytest.mark.parametrize("estimator", ["fd_fused", "jvp", "frobenius"])
def test_zoo_on_a_gpu_scores_with_the_kernels(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.pruners import zoo

    ran: list[str] = []
    for name in ("mean_change", "mean_square_change"):
        real = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *a, name=name, real=real, **k: ran.append(name) or real(*a, **k))
    x, _, directions = problem(80, 64, 128, 128, 32, torch.bfloat16)
    first, second = nn.Linear(64, 128), nn.Linear(128, 128)
    projector = nn.Sequential(first, nn.GELU(), second).bfloat16().cuda()
    got = zoo.sensitivity(x, projector, directions, 0.01, estimator)
    assert ran == ["mean_square_change" if estimator == "frobenius" else "mean_change"]
    expected = zoo.sensitivity(x.cpu().double(), projector.cpu().double(), directions.cpu().double(), 0.01, estimator)
    close(got.cpu(), expected, 5e-3)
    assert zoo.spearman(got.cpu(), expected) > 0.98
