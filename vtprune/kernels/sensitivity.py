# SPDX-License-Identifier: Apache-2.0
r"""How much the output of a two-layer projector changes with its input: ZOO-Prune's sensitivity, from the weights.

The projector is ``W2 act(W1 x + b1) + b2``. With ``a = W1 x + b1`` and ``c_j = W1 u_j`` for a direction u_j::

    fd_fused    S_i = 1/m * sum_j || W2 [act(a_i + h c_j) - act(a_i - h c_j)] || / (2 h)
    jvp         S_i = 1/m * sum_j || W2 (act'(a_i) * c_j) ||                               the limit for h -> 0
    frobenius   S_i = sqrt(g_i^T G g_i / d_v),   g_i = act'(a_i),   G = (W1 W1^T) * (W2^T W2)

`ZooPruner` says where they come from. Tokens do not see each other here, so ragged rows need no lengths.

The kernel of the first two is one matrix product of ``[m N, D_h]`` with W2. A tile of its left side is made when it is
needed, and only the squared length of each row of the product is kept: neither ``m N D_h`` nor ``m N D`` numbers are
ever written. Every tile is made once per block of W2's rows, so it has to be cheap: two evaluations of an activation
per number would take longer than the product. Instead each token and neuron gets the parabola in the step that the
central difference follows::

    [act(a + s t) - act(a - s t)] / 2 = t (alpha + beta t^2),   s = h * max_j |c_j|,   -1 <= t = h c_j / s <= 1

exact at t = 1/2 and t = 1, and elsewhere up to ``s^4 act'''''(a) / 500``: 1e-10 at a step of 0.01.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ._jit import describable, descriptor, device_of, jit, multipliable, tl, triton
from .dispatch import resolve

Activation = Callable[[Tensor], Tensor]

#: Values that one block of directions may take in the PyTorch form.
BLOCK = 1 << 24


class Layers(NamedTuple):
    """``outer act(inner x + bias)``: ``inner [D_h, d_v]``, ``bias [D_h]`` or None, ``outer [D, D_h]``."""

    inner: Tensor
    bias: Tensor | None
    act: Activation
    outer: Tensor


@torch.no_grad()
def mean_change(rows: Tensor, layers: Layers, directions: Tensor, h: float, *, backend: str = "auto") -> Tensor:
    """Mean length of the projector's change per unit step, over directions that all tokens share.

    Parameters
    ----------
    rows : Tensor
        ``[T, d_v]`` encoder rows.
    layers
        The projector. Triton multiplies in the dtype of ``outer`` if that is bf16 or fp16, else in bf16, and sums in
        fp32; use ``"torch"`` where fp32 weights are to be taken at their word.
    directions : Tensor
        ``[m, d_v]`` of unit length.
    h
        Step of the central difference (``fd_fused``); 0: the derivative (``jvp``).

    Returns
    -------
    Tensor
        ``[T]`` fp32 (PyTorch: fp64 where rows are).
    """
    _check(rows, layers)
    if directions.ndim != 2 or directions.shape[1] != rows.shape[1] or not len(directions):
        raise InputError(f"directions have shape {tuple(directions.shape)}; give [m, {rows.shape[1]}], m from 1 on")
    if not h >= 0:
        raise InputError(f"h={h!r} is no step; give 0 or a number above it")
    run = _change_triton if resolve(backend, rows) == "triton" else reference_change
    return run(rows.detach(), Layers(*_detached(layers)), directions.detach(), float(h))


@torch.no_grad()
def mean_square_change(rows: Tensor, layers: Layers, gram: Tensor, *, backend: str = "auto") -> Tensor:
    """Root mean square of the projector's change over all directions: the Frobenius norm of its Jacobian, scaled.

    Parameters
    ----------
    rows, layers
        As in `mean_change`.
    gram : Tensor
        ``[D_h, D_h]``, ``(inner inner^T) * (outer^T outer)``; once per checkpoint. Triton multiplies in bf16.

    Returns
    -------
    Tensor
        ``[T]`` fp32 (PyTorch: fp64 where rows are).
    """
    _check(rows, layers)
    if gram.shape != (layers.inner.shape[0],) * 2:
        raise InputError(f"gram has shape {tuple(gram.shape)}; give [{layers.inner.shape[0]}] * 2")
    run = _frobenius_triton if resolve(backend, rows) == "triton" else reference_frobenius
    return run(rows.detach(), Layers(*_detached(layers)), gram.detach())


def _check(rows: Tensor, layers: Layers) -> None:
    inner, bias, _, outer = layers
    fits = inner.ndim == outer.ndim == rows.ndim == 2 and inner.shape == (outer.shape[1], rows.shape[1])
    if not fits or (bias is not None and bias.shape != inner.shape[:1]):
        raise InputError(
            f"rows {tuple(rows.shape)}, inner {tuple(inner.shape)} and outer {tuple(outer.shape)} do not fit; give "
            "[T, d_v], [D_h, d_v] and [D, D_h]"
        )


def _detached(layers: Layers) -> tuple[Tensor, Tensor | None, Activation, Tensor]:
    inner, bias, act, outer = layers
    return inner.detach(), None if bias is None else bias.detach(), act, outer.detach()


# -- PyTorch ----------------------------------------------------------------------------------------------------------


def _hidden(rows: Tensor, layers: Layers, dtype: torch.dtype) -> Tensor:
    bias = None if layers.bias is None else layers.bias.to(dtype)
    return nn.functional.linear(rows.to(dtype), layers.inner.to(dtype), bias)


def slope(act: Activation, at: Tensor) -> Tensor:
    """Derivative of an elementwise function."""
    return torch.func.jvp(act, (at,), (torch.ones_like(at),))[1]


def reference_change(rows: Tensor, layers: Layers, directions: Tensor, h: float) -> Tensor:
    """`mean_change` in plain PyTorch, some directions at a time."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        at, outer, act = _hidden(rows, layers, dtype), layers.outer.to(dtype), layers.act
        rate = None if h else slope(act, at)
        total = at.new_zeros(rows.shape[0])
        for some in directions.to(dtype).split(max(1, BLOCK // max(1, rows.shape[0] * max(outer.shape)))):
            step = (some @ layers.inner.to(dtype).T)[:, None]
            change = step * rate if rate is not None else (act(at + h * step) - act(at - h * step)) / (2 * h)
            total += torch.linalg.vector_norm(change @ outer.T, dim=-1).sum(0)
        return total / len(directions)


def reference_frobenius(rows: Tensor, layers: Layers, gram: Tensor) -> Tensor:
    """`mean_square_change` in plain PyTorch."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        rate = slope(layers.act, _hidden(rows, layers, dtype))
        return ((rate @ gram.to(dtype)) * rate).sum(1).clamp(min=0).div(rows.shape[1]).sqrt()


# -- Triton -----------------------------------------------------------------------------------------------------------


def activation(act: Activation) -> str | None:
    """The name of an activation that the kernels know; None for others, which PyTorch evaluates."""
    kind, module = type(act).__name__, type(act).__module__
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    if module == "transformers.activations":
        if kind == "GELUActivation":
            return "gelu" if getattr(act, "act", None) is nn.functional.gelu else None
        known = {"SiLUActivation": "silu", "QuickGELUActivation": "quick_gelu"}
        return known.get(kind, "gelu_tanh" if kind in ("GELUTanh", "PytorchGELUTanh") else None)
    return "silu" if type(act) is nn.SiLU else "relu" if type(act) is nn.ReLU else None


@jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def _value(x, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # (1 + tanh y) / 2 is the sigmoid of 2 y
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "quick_gelu":
        return x * _sigmoid(1.702 * x)
    elif ACT == "silu":
        return x * _sigmoid(x)
    else:
        return tl.maximum(x, 0.0)


@jit
def _derivative(x, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        s = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACT == "quick_gelu":
        s = _sigmoid(1.702 * x)
        return s + 1.702 * x * s * (1.0 - s)
    elif ACT == "silu":
        s = _sigmoid(x)
        return s + x * s * (1.0 - s)
    else:
        return tl.where(x > 0.0, 1.0, 0.0)


@jit
def _rate_kernel(  # type: ignore[no-untyped-def]
    at, bias, reach, alpha, beta, width, ACT: tl.constexpr, BIAS: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr
):
    """``at [T, D_h]`` (without its bias) to what a step does there: act' (FORM 0), times reach (1), or the parabola
    (2), whose `reach` is the longest step s."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = lane < width
    a = tl.load(at + row * width + lane, mask=here, other=0.0).to(tl.float32)
    if BIAS:
        a += tl.load(bias + lane, mask=here, other=0.0).to(tl.float32)
    if FORM == 2:
        s = tl.load(reach + lane, mask=here, other=0.0)
        far = 0.5 * (_value(a + s, ACT) - _value(a - s, ACT))
        near = _value(a + 0.5 * s, ACT) - _value(a - 0.5 * s, ACT)
        tl.store(alpha + row * width + lane, (4.0 * near - far) / 3.0, mask=here)
        tl.store(beta + row * width + lane, (far - near) * 4.0 / 3.0, mask=here)
    else:
        rate = _derivative(a, ACT)
        if FORM == 1:
            rate *= tl.load(reach + lane, mask=here, other=0.0)
        tl.store(alpha + row * width + lane, rate, mask=here)


@jit
def _change_kernel(  # type: ignore[no-untyped-def]
    alpha,
    beta,
    step,
    outer,
    out,
    tokens,
    m,
    width,
    rows,
    span,
    stride,
    TT: tl.constexpr,
    MB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CUBIC: tl.constexpr,
    FORM: tl.constexpr,
    TMA: tl.constexpr,
):
    """Squared lengths ``out [parts, T, m]`` of TT tokens times MB directions, over `span` rows of `outer`."""
    blocks = tl.cdiv(m, MB)
    token = tl.program_id(0) // blocks * TT
    first = tl.program_id(0) % blocks * MB
    part = tl.program_id(1)
    BM: tl.constexpr = TT * MB
    r = tl.arange(0, BM)
    direction = first + r % MB
    mine = token + r // MB
    total = tl.zeros([BM], dtype=tl.float32)
    k = tl.arange(0, BK)
    some = token + tl.arange(0, TT)
    j = first + tl.arange(0, MB)
    high = tl.minimum(rows, (part + 1) * span)
    for row in range(part * span, high, BN):
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        n = row + tl.arange(0, BN)
        for start in range(0, width, BK):
            at = start + k
            inside = at < width
            if FORM == 0:  # each row of the tile loads its own
                t = tl.load(
                    step + direction[:, None] * width + at[None, :],
                    mask=(direction < m)[:, None] & inside[None, :],
                    other=0.0,
                )
                own = mine.to(tl.int64)[:, None] * width + at[None, :]
                valid = (mine < tokens)[:, None] & inside[None, :]
                x = tl.load(alpha + own, mask=valid, other=0.0).to(tl.float32)
                u = t.to(tl.float32)
                if CUBIC:
                    x += tl.load(beta + own, mask=valid, other=0.0).to(tl.float32) * u * u
                left = (x * u).to(t.dtype)
            elif FORM == 1:  # two tokens: their rates are loaded once
                t = tl.load(
                    step + direction[:, None] * width + at[None, :],
                    mask=(direction < m)[:, None] & inside[None, :],
                    other=0.0,
                )
                u = t.to(tl.float32)
                base = token.to(tl.int64) * width
                x0 = tl.load(alpha + base + at, mask=inside, other=0.0).to(tl.float32)
                x1 = tl.load(alpha + base + width + at, mask=inside & (token + 1 < tokens), other=0.0).to(tl.float32)
                x = tl.where((r < MB)[:, None], x0[None, :], x1[None, :])
                if CUBIC:
                    y0 = tl.load(beta + base + at, mask=inside, other=0.0).to(tl.float32)
                    y1 = tl.load(beta + base + width + at, mask=inside & (token + 1 < tokens), other=0.0).to(tl.float32)
                    x += tl.where((r < MB)[:, None], y0[None, :], y1[None, :]) * u * u
                left = (x * u).to(t.dtype)
            else:  # tokens times directions
                t = tl.load(step + j[:, None] * width + at[None, :], mask=(j < m)[:, None] & inside[None, :], other=0.0)
                u = t.to(tl.float32)[None, :, :]
                own = some.to(tl.int64)[:, None] * width + at[None, :]
                valid = (some < tokens)[:, None] & inside[None, :]
                x = tl.load(alpha + own, mask=valid, other=0.0).to(tl.float32)[:, None, :]
                if CUBIC:
                    y = tl.load(beta + own, mask=valid, other=0.0).to(tl.float32)[:, None, :]
                    left = (u * (x + y * (u * u))).to(t.dtype)
                else:
                    left = (u * x).to(t.dtype)
                left = tl.reshape(left, [BM, BK])
            if TMA:
                right = outer.load([row, start])
            else:
                right = tl.load(
                    outer + n.to(tl.int64)[:, None] * stride + at[None, :],
                    mask=(n < high)[:, None] & inside[None, :],
                    other=0.0,
                )
            acc = tl.dot(left, right.T, acc)
        total += tl.sum(acc * acc, 1)
    where = (part * tokens + mine).to(tl.int64) * m + direction
    tl.store(out + where, total, mask=(mine < tokens) & (direction < m))


@jit
def _frobenius_kernel(  # type: ignore[no-untyped-def]
    rate, rate_tile, gram, out, tokens, width, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr
):
    """``sum_k (rate G)_k rate_k`` over BN columns, ``out [parts, T]``; `rate_tile` is `rate` in tiles ``[BM, BN]``."""
    row = tl.program_id(0) * BM
    part = tl.program_id(1)
    col = part * BN
    r = row + tl.arange(0, BM)
    n = col + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, width, BK):
        if TMA:
            left = rate.load([row, start])
            right = gram.load([col, start])
        else:
            at = start + k
            inside = (at < width)[None, :]
            own = r.to(tl.int64)[:, None] * width + at[None, :]
            left = tl.load(rate + own, mask=(r < tokens)[:, None] & inside, other=0.0)
            other = n.to(tl.int64)[:, None] * width + at[None, :]
            right = tl.load(gram + other, mask=(n < width)[:, None] & inside, other=0.0)
        acc = tl.dot(left, right.T, acc)
    if TMA:
        mine = rate_tile.load([row, col])
    else:
        own = r.to(tl.int64)[:, None] * width + n[None, :]
        mine = tl.load(rate_tile + own, mask=(r < tokens)[:, None] & (n < width)[None, :], other=0.0)
    tl.store(out + part * tokens + r, tl.sum(acc * mine.to(tl.float32), 1), mask=r < tokens)


def _affine(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows weight^T`` in fp32; half-precision factors are exact, and are multiplied in tensor cores."""
    if rows.is_cuda and rows.dtype == weight.dtype and rows.dtype in (torch.bfloat16, torch.float16):
        try:
            return torch.mm(rows, weight.T, out_dtype=torch.float32)
        except TypeError:  # PyTorch before 2.8
            pass
    return rows.float() @ weight.float().T


def _rates(rows: Tensor, layers: Layers, reach: Tensor | None, form: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `_rate_kernel` makes, in `dtype`; alpha twice where there is no beta."""
    inner, bias, act, _ = layers
    at = _affine(rows, inner)
    alpha = torch.empty_like(at, dtype=dtype)
    beta = torch.empty_like(alpha) if form == 2 else alpha
    kind = activation(act)
    if kind is not None:
        block = min(1024, triton.next_power_of_2(at.shape[1]))
        _rate_kernel[(at.shape[0], -(-at.shape[1] // block))](
            at, at if bias is None else bias, at if reach is None else reach, alpha, beta, at.shape[1],
            ACT=kind, BIAS=bias is not None, FORM=form, BLOCK=block, num_warps=4,
        )  # fmt: skip
        return alpha, beta
    at = at if bias is None else at + bias.float()
    if form < 2:
        rate = slope(act, at)
        alpha.copy_(rate if reach is None else rate * reach)
        return alpha, alpha
    assert reach is not None
    far, near = (act(at + reach) - act(at - reach)) / 2, act(at + reach / 2) - act(at - reach / 2)
    alpha.copy_((4 * near - far) / 3)
    beta.copy_((far - near) * (4 / 3))
    return alpha, beta


#: Rows of `outer` per tile, step along the width, warps, stages, form, rows per tile.
_CHANGE = (128, 64, 8, 3, 2, 128)
_FROBENIUS = (128, 128, 64, 8, 3)


def _change_triton(rows: Tensor, layers: Layers, directions: Tensor, h: float) -> Tensor:
    outer = layers.outer
    dtype = outer.dtype if outer.dtype == torch.float16 else torch.bfloat16
    outer = multipliable(outer.to(dtype).contiguous())
    tokens, m, width = rows.shape[0], len(directions), outer.shape[1]
    if not tokens:
        return torch.zeros(0, dtype=torch.float32, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False), device_of(rows):
        step = directions.float() @ layers.inner.float().T
        longest = step.abs().amax(0)
        reach = longest * h if h else longest
        alpha, beta = _rates(rows, layers, reach, 2 if h else 1, outer.dtype)
        step = (step / longest.clamp(min=1e-30)).to(outer.dtype)
        bn, bk, warps, stages, form, bm = _CHANGE
        mb = max(16, min(bm, triton.next_power_of_2(m)))
        tt = bm // mb
        tma = describable(outer)
        tiles = -(-tokens // tt) * -(-m // mb)
        parts = min(4, -(-outer.shape[0] // bn))
        span = -(-outer.shape[0] // (bn * parts)) * bn
        parts = -(-outer.shape[0] // span)
        out = torch.empty(parts, tokens, m, dtype=torch.float32, device=rows.device)
        _change_kernel[(tiles, parts)](
            alpha, beta, step, descriptor(outer, [bn, bk]) if tma else outer, out, tokens, m, width, outer.shape[0],
            span, outer.stride(0), TT=tt, MB=mb, BN=bn, BK=bk, CUBIC=bool(h), FORM=form, TMA=tma, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
        return out.sum(0).sqrt_().mean(1) / (h or 1.0)


def _frobenius_triton(rows: Tensor, layers: Layers, gram: Tensor) -> Tensor:
    tokens = rows.shape[0]
    if not tokens:
        return torch.zeros(0, dtype=torch.float32, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False), device_of(rows):
        rate, _ = _rates(rows, layers, None, 0, torch.bfloat16)
        rate, gram = multipliable(rate), multipliable(gram.to(torch.bfloat16).contiguous())
        bm, bn, bk, warps, stages = _FROBENIUS
        width = gram.shape[0]
        parts = -(-width // bn)
        tma = describable(rate, gram)
        out = torch.empty(parts, tokens, dtype=torch.float32, device=rows.device)
        left, tile, right = rate, rate, gram
        if tma:
            left, tile, right = descriptor(rate, [bm, bk]), descriptor(rate, [bm, bn]), descriptor(gram, [bn, bk])
        _frobenius_kernel[(-(-tokens // bm), parts)](
            left, tile, right, out, tokens, width, BM=bm, BN=bn, BK=bk, TMA=tma, num_warps=warps, num_stages=stages
        )
        return out.sum(0).clamp_(min=0).div_(rows.shape[1]).sqrt_()
