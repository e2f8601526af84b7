# SPDX-License-Identifier: Apache-2.0
r"""How much the output of a two-layer projector changes with its input: ZOO-Prune's sensitivity, from the weights.

The projector is ``W2 act(W1 x + b1) + b2``. With ``a = W1 x + b1`` and ``c_j = W1 u_j`` for a direction u_j::

    fd_fused    S_i = 1/m * sum_j || W2 [act(a_i + h c_j) - act(a_i - h c_j)] || / (2 h)
    jvp         S_i = 1/m * sum_j || W2 (act'(a_i) * c_j) ||                               the limit for h -> 0
    frobenius   S_i = sqrt(g_i^T G g_i / d_v),   g_i = act'(a_i),   G = (W1 W1^T) * (W2^T W2)

`ZooPruner` says where they come from. Tokens do not see each other here, so ragged rows need no lengths.

The kernel of the first two is one matrix product of ``[m N, D_h]`` with W2. A tile of its left side is made when it is
needed, and only the squared length of each row of the product is kept: neither ``m N D_h`` nor ``m N D`` numbers are
ever written. Lengths do not change if W2 becomes the triangle R of its QR decomposition (`triangle`), whose zeros need
not be multiplied. Every tile is made once per block of rows, so it has to be cheap: two evaluations of an activation
per number would take longer than the product. Instead each token and neuron gets the parabola in the step that the
central difference follows::

    [act(a + s t) - act(a - s t)] / 2 = t (alpha + beta t^2),   s = h * max_j |c_j|,   -1 <= t = h c_j / s <= 1

exact at t = 1/2 and t = 1, and elsewhere up to ``s^4 act'''''(a) / 500``. Where no s is above `STRAIGHT`, beta is less
than a tenth of what rounding to half precision does to alpha: then alpha is act', beta is nothing, and the tile is one
multiplication. The device decides, and the host need not know: both forms are launched, and one of them has no work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ._jit import Launch, device_of, jit, multipliable, precise, remember, stages_for, tl, triton
from .dispatch import forgiving, half, resolve

Activation = Callable[[Tensor], Tensor]

#: Values that one block of directions may take in the PyTorch form.
BLOCK = 1 << 24
#: Longest step in front of the activation up to which its derivative is its difference, in half precision.
STRAIGHT = 1 / 32


class Layers(NamedTuple):
    """``outer act(inner x + bias)``: ``inner [D_h, d_v]``, ``bias [D_h]`` or None, ``outer [D, D_h]``."""

    inner: Tensor
    bias: Tensor | None
    act: Activation
    outer: Tensor


@forgiving
@torch.no_grad()
def mean_change(
    rows: Tensor, layers: Layers, directions: Tensor, h: float, *, triangular: bool = False, backend: str = "auto"
) -> Tensor:
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
    triangular
        ``layers.outer`` has zeros below its diagonal, see `triangle`: Triton passes over them, half of the work.

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
    rows, layers, directions = rows.detach(), Layers(*_detached(layers)), directions.detach()
    if resolve(backend, rows) == "triton":
        return _change_triton(rows, layers, directions, float(h), triangular)
    return reference_change(rows, layers, directions, float(h))


@torch.no_grad()
def triangle(outer: Tensor) -> Tensor:
    """An upper triangle R, ``[min(D, D_h), D_h]`` in the dtype of ``outer [D, D_h]``, that can stand for it in lengths.

    ``R^T R = outer^T outer`` (QR decomposition), so ``|| R y || = || outer y ||`` for all y. Once per checkpoint.
    """
    wide = torch.promote_types(outer.dtype, torch.float32)
    return torch.linalg.qr(outer.detach().to(wide), mode="r").R.to(outer.dtype)


@forgiving
@torch.no_grad()
def mean_square_change(rows: Tensor, layers: Layers, gram: Tensor, *, backend: str = "auto") -> Tensor:
    """Root mean square of the projector's change over all directions: the Frobenius norm of its Jacobian, scaled.

    Parameters
    ----------
    rows, layers
        As in `mean_change`.
    gram : Tensor
        ``[D_h, D_h]``, ``(inner inner^T) * (outer^T outer)``; once per checkpoint. Triton multiplies in bf16, and reads
        the lower half only.

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
    at, bias, longest, bent, alpha, beta, tokens, width, pitch, h,
    ACT: tl.constexpr, BIAS: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``at [T, D_h]`` (without its bias) to what a step does there, per unit: act' (FORM 0), times `longest` (1), or
    where `bent` the parabola (2). Rows and columns beyond ``[T, D_h]`` become zeros."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = (lane < width) & (row < tokens)
    a = tl.load(at + row * width + lane, mask=here, other=0.0).to(tl.float32)
    if BIAS:
        a += tl.load(bias + lane, mask=here, other=0.0).to(tl.float32)
    one = _derivative(a, ACT)
    if FORM > 0:
        most = tl.load(longest + lane, mask=here, other=0.0)
        one *= most
    if FORM == 2:
        three = tl.zeros([BLOCK], dtype=tl.float32)
        if tl.load(bent) != 0:
            s = most * h
            far = 0.5 * (_value(a + s, ACT) - _value(a - s, ACT))
            near = _value(a + 0.5 * s, ACT) - _value(a - 0.5 * s, ACT)
            one = (4.0 * near - far) / (3.0 * h)
            three = (far - near) * 4.0 / (3.0 * h)
        tl.store(beta + row * pitch + lane, tl.where(here, three, 0.0), mask=lane < pitch)
    tl.store(alpha + row * pitch + lane, tl.where(here, one, 0.0), mask=lane < pitch)


@jit
def _change_kernel(  # type: ignore[no-untyped-def]
    alpha, beta, step, outer, bent, out, tokens, m, width, rows, turns,
    TT: tl.constexpr, MB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    EVEN: tl.constexpr, TRIANGLE: tl.constexpr, CUBIC: tl.constexpr, EITHER: tl.constexpr,
):  # fmt: skip
    """Squared lengths ``out [PARTS, T, m]`` of TT tokens times MB directions, over some blocks of BN rows of `outer`.

    `alpha`, `beta` and `step` have zeros where they exceed tokens, directions and width; `width` is a multiple of BK,
    and EVEN: `rows` one of BN. TRIANGLE: `outer` has zeros below its diagonal. Parts take blocks of rows to and fro, so
    that all have as much to do. EITHER: of the launches with and without CUBIC, the one that `bent` names has work."""
    blocks = tl.cdiv(m, MB)
    token = tl.program_id(0) // blocks * TT
    first = tl.program_id(0) % blocks * MB
    part = tl.program_id(1)
    BM: tl.constexpr = TT * MB
    r = tl.arange(0, BM)
    k = tl.arange(0, BK)
    own = (token + tl.arange(0, TT)).to(tl.int64)[:, None] * width + k[None, :]
    steps = step + (first + tl.arange(0, MB))[:, None] * width + k[None, :]
    mine = token + r // MB
    here = (mine < tokens) & (first + r % MB < m)
    if EITHER:
        work = (tl.load(bent) != 0) if CUBIC else (tl.load(bent) == 0)
        turns = tl.where(work, turns, 0)
        here = here & work
    total = tl.zeros([BM], dtype=tl.float32)
    for turn in range(0, turns):
        row = (turn * PARTS + tl.where(turn % 2 == 0, part, PARTS - 1 - part)) * BN
        low = tl.where(row < rows, row if TRIANGLE else 0, width)
        n = row + tl.arange(0, BN)
        others = outer + n.to(tl.int64)[:, None] * width + k[None, :]
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        for start in range(low, width, BK):
            # No descriptors here: with them Triton 3.6 refills a tile while it is still being read, most often where a
            # tile has 32 directions. A stress test shows it; through pointers it shows nothing in a million sums.
            t = tl.load(steps + start)
            right = tl.load(others + start) if EVEN else tl.load(others + start, mask=(n < rows)[:, None], other=0.0)
            # Tokens times directions, in half precision: twice the rate of fp32, and no other accuracy. Coefficients
            # come in fp32, wide enough for an asynchronous copy: in half precision each step would wait for them.
            u = t[None, :, :]
            x = tl.load(alpha + own + start).to(t.dtype)[:, None, :]
            if CUBIC:
                x = x + tl.load(beta + own + start).to(t.dtype)[:, None, :] * (u * u)
            acc = tl.dot(tl.reshape(u * x, [BM, BK]), right.T, acc)
        total += tl.sum(acc * acc, 1)
    where = (part * tokens + mine).to(tl.int64) * m + first + r % MB
    tl.store(out + where, total, mask=here)


@jit
def _slope_kernel(  # type: ignore[no-untyped-def]
    x, inner, bias, rate, tokens, width, depth, step_x, step_w,
    ACT: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``rate [whole blocks of rows, width]``: act' of ``x inner^T + bias``; rows beyond the last one repeat it."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    xs = x + tl.minimum(r, tokens - 1).to(tl.int64)[:, None] * step_x + k[None, :]
    ws = inner + tl.minimum(n, width - 1).to(tl.int64)[:, None] * step_w + k[None, :]
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, depth, BK):
        inside = (start + k < depth)[None, :]
        a = tl.load(xs + start) if EVEN else tl.load(xs + start, mask=inside, other=0.0)
        b = tl.load(ws + start) if EVEN else tl.load(ws + start, mask=inside, other=0.0)
        acc = tl.dot(a, b.T, acc)
    if BIAS:
        acc += tl.load(bias + tl.minimum(n, width - 1)).to(tl.float32)[None, :]
    to = rate + r.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(to, _derivative(acc, ACT).to(rate.dtype.element_ty), mask=(n < width)[None, :])


@jit
def _form_kernel(  # type: ignore[no-untyped-def]
    rate, gram, out, tokens, width, parts, factor,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``factor g^T G g`` with BN rows of the lower half of a symmetric G, ``out [parts, T]``; g are rows of `rate`,
    which has whole blocks of them.

    Those with the longest rows come first: what is short fills the gaps."""
    part = parts - 1 - tl.program_id(1)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    n = part * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left = rate + r.to(tl.int64)[:, None] * width + k[None, :]
    right = gram + tl.minimum(n, width - 1).to(tl.int64)[:, None] * width + k[None, :]
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, part * BN, BK):  # whole blocks: nothing to mask
        acc = tl.dot(tl.load(left + start), tl.load(right + start).T, acc)
    acc = acc * 2.0  # the upper half
    for start in range(part * BN, part * BN + BN, BK):
        inside = (start + k < width)[None, :]
        a = tl.load(left + start) if EVEN else tl.load(left + start, mask=inside, other=0.0)
        b = tl.load(right + start) if EVEN else tl.load(right + start, mask=inside, other=0.0)
        acc = tl.dot(a, b.T, acc)
    own = rate + r.to(tl.int64)[:, None] * width + n[None, :]
    mine = tl.load(own) if EVEN else tl.load(own, mask=(n < width)[None, :], other=0.0)
    tl.store(out + part * tokens + r, tl.sum(acc * mine.to(tl.float32), 1) * factor, mask=r < tokens)


@jit
def _root_kernel(parts_of, out, tokens, parts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(0, parts):
        total += tl.load(parts_of + part * tokens + t, mask=t < tokens, other=0.0)
    tl.store(out + t, tl.sqrt(tl.where(total < 0.0, 0.0, total)), mask=t < tokens)  # NaN stays


def _affine(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows weight^T`` in fp32; half-precision factors are exact, and are multiplied in tensor cores."""
    if rows.is_cuda and rows.dtype == weight.dtype and rows.dtype in (torch.bfloat16, torch.float16):
        try:
            return torch.mm(rows, weight.T, out_dtype=torch.float32)
        except TypeError:  # PyTorch before 2.8
            pass
    return rows.float() @ weight.float().T


def _rates(
    rows: Tensor, layers: Layers, dtype: torch.dtype, shape: tuple[int, int], longest: Tensor | None, h: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_rate_kernel` makes, ``alpha, beta [shape]`` and whether it bent, ``[1]``; alpha twice if there is no step.

    `longest` is given for changes, and not for the derivative alone."""
    inner, bias, act, _ = layers
    at = _affine(rows, inner)
    tokens, width = at.shape
    alpha = torch.empty(shape, dtype=dtype, device=at.device)
    if longest is None or not h:
        beta, bent = alpha, alpha
    else:
        beta, bent = torch.empty_like(alpha), (longest.amax(0, keepdim=True) * h > STRAIGHT).to(torch.int32)
    kind = activation(act)
    if kind is not None:
        block = min(1024, triton.next_power_of_2(shape[1]))
        _rate_kernel[(shape[0], -(-shape[1] // block))](
            at, at if bias is None else bias, at if longest is None else longest, bent, alpha, beta, tokens, width,
            shape[1], h, ACT=kind, BIAS=bias is not None, FORM=0 if longest is None else 2 if h else 1, BLOCK=block,
            num_warps=4,
        )  # fmt: skip
        return alpha, beta, bent
    at = at if bias is None else at + bias.float()
    rate = slope(act, at)
    one, three = rate if longest is None else rate * longest, torch.zeros_like(rate)
    if longest is not None and h:
        s = longest * h
        far, near = (act(at + s) - act(at - s)) / 2, act(at + s / 2) - act(at - s / 2)
        one = torch.where(bent > 0, (4 * near - far) / (3 * h), one)
        beta.zero_()[:tokens, :width] = torch.where(bent > 0, (far - near) * (4 / 3 / h), three)
    alpha.zero_()[:tokens, :width] = one
    return alpha, beta, bent


def _padded(x: Tensor, rows: int, width: int) -> Tensor:
    """``x`` with zeros up to ``[rows, width]``; itself where there is nothing to add."""
    more = width - x.shape[1], rows - x.shape[0]
    return nn.functional.pad(x, (0, more[0], 0, more[1])) if any(more) else x


#: Tokens times directions per tile, most directions of them, rows of `outer`, step along the width, warps; stages
#: without and with the parabola; parts that the rows of `outer` are dealt out to.
_CHANGE = (128, 64, 256, 64, 8)
_STAGES = (4, 3)
_PARTS = 4
#: Rows, columns, step along the width, warps and stages: of the rates, of the form.
_SLOPE = (64, 128, 64, 4, 4)
_FORM = (64, 128, 64, 4, 4)
#: The launches of `mean_square_change` by shape and place, the oldest go first.
_LAUNCHES: dict[Any, tuple[Any, ...]] = {}
_MOST_LAUNCHES = 256


def _change_triton(rows: Tensor, layers: Layers, directions: Tensor, h: float, triangular: bool) -> Tensor:
    outer = layers.outer
    dtype = outer.dtype if outer.dtype == torch.float16 else torch.bfloat16
    tokens, m, width = rows.shape[0], len(directions), outer.shape[1]
    if not tokens:
        return torch.zeros(0, dtype=torch.float32, device=rows.device)
    bm, most, bn, bk, warps = _CHANGE
    pitch = -(-width // bk) * bk
    outer = _padded(multipliable(outer.to(dtype)), outer.shape[0], pitch).contiguous()
    with precise(rows), device_of(rows):
        step = directions.float() @ layers.inner.float().T
        longest = step.abs().amax(0)
        mb = max(16, min(most, triton.next_power_of_2(m)))
        tt, blocks = bm // mb, -(-m // mb)
        tiles = -(-tokens // tt)
        alpha, beta, bent = _rates(rows, layers, torch.float32, (tiles * tt, pitch), longest, h)
        step = step.div_(longest.clamp(min=1e-30)).to(outer.dtype)
        step = _padded(step, blocks * mb, pitch)
        # As many parts for few tokens as for many, so that a token's sum is always the same.
        turns = -(-outer.shape[0] // (bn * _PARTS))
        out = torch.empty(_PARTS, tokens, m, dtype=torch.float32, device=rows.device)
        for cubic in (False, True) if h else (False,):
            stages = stages_for(rows, _STAGES[cubic], 2 * bk * (bn + mb) + 4 * bk * tt * (1 + cubic))
            _change_kernel[(tiles * blocks, _PARTS)](
                alpha, beta, step, outer, bent, out, tokens, m, pitch, outer.shape[0], turns, TT=tt, MB=mb, BN=bn,
                BK=bk, PARTS=_PARTS, EVEN=outer.shape[0] % bn == 0, TRIANGLE=triangular, CUBIC=cubic, EITHER=h > 0,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return out.sum(0).sqrt_().mean(1)


def _frobenius_triton(rows: Tensor, layers: Layers, gram: Tensor) -> Tensor:
    inner, bias, act, _ = layers
    (tokens, depth), width = rows.shape, gram.shape[0]
    if not tokens:
        return torch.zeros(0, dtype=torch.float32, device=rows.device)
    with precise(rows), device_of(rows):
        gram = multipliable(gram.to(torch.bfloat16).contiguous())
        high, parts = -(-tokens // _FORM[0]) * _FORM[0], -(-width // _FORM[1])
        # What is multiplied as it is needs one launch.
        kind = activation(act) if rows.dtype == inner.dtype and half(rows) else None
        between = torch.empty(parts, tokens, dtype=torch.float32, device=rows.device)
        out = torch.empty(tokens, dtype=torch.float32, device=rows.device)
        if kind is not None:
            rows, inner = (x if x.stride(1) == 1 else x.contiguous() for x in (multipliable(rows), multipliable(inner)))
            covered = -(-high // _SLOPE[0]) * _SLOPE[0]
            rate = torch.empty(covered, width, dtype=gram.dtype, device=rows.device)
        else:
            rate = multipliable(_rates(rows, layers, torch.bfloat16, (high, width), None, 0.0)[0])
        slope_of, form, root = _launches(rows, inner, bias, gram, kind, high, _SLOPE, _FORM)
        if slope_of is not None:
            slope_of(
                rows, inner, inner if bias is None else bias, rate, tokens, width, depth, rows.stride(0),
                inner.stride(0),
            )  # fmt: skip
        form(rate, gram, between, tokens, width, parts, 1.0 / depth)
        root(between, out, tokens, parts)
        return out


def _launches(
    rows: Tensor, inner: Tensor, bias: Tensor | None, gram: Tensor, kind: str | None, high: int,
    slope_tile: tuple[int, ...], form_tile: tuple[int, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """The launches of `mean_square_change`, the first of them None if `kind` is; see `_jit.Launch`."""
    (tokens, depth), width = rows.shape, gram.shape[0]
    weights = (rows, inner, gram) if bias is None else (rows, inner, gram, bias)
    key = (
        rows.shape, rows.stride(), rows.device, kind, width, inner.stride(0), slope_tile, form_tile,
        *((x.dtype, x.data_ptr() % 16) for x in weights),
    )  # fmt: skip
    found = _LAUNCHES.get(key)
    if found is None:
        am, an, ak, warps, stages = slope_tile
        first = None if kind is None else Launch(
            _slope_kernel, (-(-high // am), -(-width // an)), (kind, bias is not None, depth % ak == 0, am, an, ak),
            num_warps=warps, num_stages=stages_for(rows, stages, 2 * ak * (am + an)),
        )  # fmt: skip
        bm, bn, bk, warps, stages = form_tile
        second = Launch(
            _form_kernel, (high // bm, -(-width // bn)), (bm, bn, bk, width % bn == 0), num_warps=warps,
            num_stages=stages_for(rows, stages, 2 * bk * (bm + bn)),
        )  # fmt: skip
        found = first, second, Launch(_root_kernel, (-(-tokens // 128),), (128,), num_warps=4)
        remember(_LAUNCHES, key, found, _MOST_LAUNCHES)
    return found
