# SPDX-License-Identifier: Apache-2.0
"""CoreMatching's ops on FFN activations: bits of what fires, counts of what fires most, matches, and a sparse FFN."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ._jit import device_of, jit, on_device, processors, tl, triton
from .dispatch import forgiving, resolve
from .reference import wide

#: Neurons per word of a bitmap; neuron ``32 w + b`` is bit b of word w.
WORD = 32


@forgiving
@torch.no_grad()
def pack_bits(act: Tensor, *, backend: str = "auto") -> Tensor:
    """Which neurons of each token are active: ``act > 0`` as bits.

    Parameters
    ----------
    act : Tensor
        ``[T, F]`` activations behind the gate (the input of ``down_proj``). NaN is not active.

    Returns
    -------
    Tensor
        ``[T, ceil(F / 32)]`` int32.
    """
    _rows(act, "activations")
    run = _bits_triton if resolve(backend, act) == "triton" else reference_bits
    return run(act.detach())


@forgiving
@torch.no_grad()
def top_counts(
    act: Tensor, lens: Sequence[int], rho: float = 0.2, *, per_token: bool = True, backend: str = "auto"
) -> Tensor:
    """In how many tokens each neuron is among the `rho` most active: ``f(n)`` of CoreMatching.

    A token's set is its ``floor(rho * positives + 1e-6)`` largest activations, of those above 0; of equal ones the
    lowest neurons.

    Parameters
    ----------
    act : Tensor
        ``[T, F]``, the tokens of all samples, text and picture.
    lens
        Tokens per sample; host numbers.
    rho
        Fraction of the positive activations that is kept, in (0, 1].
    per_token
        True: of the token's own positives (the paper). False: every token keeps as many as `rho` of its sample's mean
        number of positives (CoreInfer's code), as far as it has that many.

    Returns
    -------
    Tensor
        ``[len(lens), F]`` int32.
    """
    _rows(act, "activations")
    if sum(lens) != act.shape[0]:
        raise InputError(f"{len(lens)} samples of {sum(lens)} tokens, but {act.shape[0]} rows of activations")
    if not 0 < rho <= 1:
        raise InputError(f"rho={rho!r} is no fraction; give a number in (0, 1]")
    run = _counts_triton if resolve(backend, act) == "triton" else reference_counts
    return run(act.detach(), lens, rho, per_token)


@torch.no_grad()
def core(counts: Tensor, beta: float = 0.4) -> tuple[Tensor, Tensor]:
    """The core neurons of each sample: the `beta` fraction with the largest counts, of those with any.

    Parameters
    ----------
    counts : Tensor
        ``[S, F]`` from `top_counts`.
    beta
        Fraction of all F neurons, in (0, 1]: ``max(1, floor(beta * F + 1e-6))``. Of equal ones the lowest.

    Returns
    -------
    ids, bits : Tensor
        ``[S, C]`` int64 ascending, -1 at the end where fewer neurons have a count, and the same sets as
        ``[S, ceil(F / 32)]`` int32 bitmaps.
    """
    _rows(counts, "counts")
    if not 0 < beta <= 1:
        raise InputError(f"beta={beta!r} is no fraction; give a number in (0, 1]")
    size = counts.shape[1]
    keep = max(1, int(beta * size + 1e-6))
    order = counts.sort(dim=1, descending=True, stable=True)
    ids = order.indices[:, :keep].masked_fill(order.values[:, :keep] <= 0, size).sort(dim=1).values
    member = counts.new_zeros(counts.shape[0], size + 1, dtype=torch.float32).scatter_(1, ids, 1.0)
    return ids.masked_fill(ids == size, -1), reference_bits(member[:, :size])


@forgiving
@torch.no_grad()
def match(bits: Tensor, cores: Tensor, lens: Sequence[int], *, backend: str = "auto") -> Tensor:
    """How many core neurons of its sample each token has active: AND and popcount.

    Parameters
    ----------
    bits : Tensor
        ``[T, W]`` int32 from `pack_bits`, or ``[T, F]`` activations, which are then read once and never packed.
    cores : Tensor
        ``[S, W]`` int32: `core`, or the bits of a reference token.
    lens
        Tokens per sample; host numbers.

    Returns
    -------
    Tensor
        ``[T]`` int32.
    """
    _rows(bits, "bits")
    words = bits.shape[1] if bits.dtype == torch.int32 else -(-bits.shape[1] // WORD)
    if cores.shape != (len(lens), words) or cores.dtype != torch.int32 or sum(lens) != bits.shape[0]:
        raise InputError(
            f"cores {tuple(cores.shape)} {cores.dtype} and {len(lens)} samples of {sum(lens)} tokens do not fit "
            f"{tuple(bits.shape)} {bits.dtype}; give one int32 bitmap of {words} words per sample"
        )
    run = _match_triton if resolve(backend, bits) == "triton" else reference_match
    return run(bits.detach(), cores, lens)


@forgiving
@torch.no_grad()
def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    ids: Tensor,
    act: str = "silu",
    *,
    backend: str = "auto",
) -> Tensor:
    """A gated FFN that reads the rows of some neurons only: ``down[:, ids] (act(gate[ids] x) * (up[ids] x))``.

    For decoding: one row, or a few that share their neurons. Nothing is copied; the neurons are gathered while the
    weights are read.

    Parameters
    ----------
    x : Tensor
        ``[B, D]``, or ``[D]``.
    gate, up : Tensor
        ``[F, D]``, rows contiguous.
    down : Tensor
        ``[D, F]``. Its columns are what is gathered, so it should lie transposed in memory
        (``weight.t().contiguous().t()``, once per model); in the usual layout it is read in full.
    ids : Tensor
        ``[C]`` int64 neurons; -1 is none.
    act
        ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.

    Returns
    -------
    Tensor
        Of the shape and dtype of `x`. Sums are fp32; the products in between are rounded to the dtype of `x`, as in a
        dense FFN.
    """
    fits = gate.shape == up.shape == down.shape[::-1] and x.shape[-1] == gate.shape[-1] and x.ndim <= 2
    if not fits or ids.ndim != 1:
        raise InputError(
            f"x {tuple(x.shape)}, gate {tuple(gate.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)} and ids "
            f"{tuple(ids.shape)} do not fit; give [B, D], [F, D], [F, D], [D, F] and [C]"
        )
    if act not in ACTIVATIONS:
        raise InputError(f"act={act!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    run = _ffn_triton if resolve(backend, x) == "triton" else reference_ffn
    return run(x.detach().view(-1, x.shape[-1]), gate.detach(), up.detach(), down.detach(), ids, act).view(x.shape)


def _rows(x: Tensor, name: str) -> None:
    if x.ndim != 2:
        raise InputError(f"{name} have shape {tuple(x.shape)}; give one row per token: [tokens, neurons]")


# -- PyTorch ----------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


def _samples(lens: Sequence[int], device: torch.device) -> Tensor:
    """Sample of each token, ``[T]`` int64, without a wait for the device."""
    return on_device(lens, device, repeat=True)


def reference_bits(act: Tensor) -> Tensor:
    """`pack_bits` in plain PyTorch."""
    words = -(-act.shape[1] // WORD)
    on = torch.nn.functional.pad((act > 0).to(torch.int64), (0, words * WORD - act.shape[1]))
    shifts = torch.arange(WORD, device=act.device)
    value = (on.view(-1, words, WORD) << shifts).sum(-1)  # at most 2^32 - 1
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)


def reference_counts(act: Tensor, lens: Sequence[int], rho: float, per_token: bool) -> Tensor:
    """`top_counts` in plain PyTorch."""
    size = act.shape[1]
    counts = torch.zeros(len(lens), size, dtype=torch.int32, device=act.device)
    start = 0
    for s, n in enumerate(lens):
        rows = act[start : start + n]
        start += n
        if n:
            quota = _quota((rows > 0).sum(1), n, rho, per_token)
            ordered = rows.float().nan_to_num(nan=-1.0, posinf=torch.inf).sort(dim=1, descending=True, stable=True)
            lane = torch.arange(size, device=act.device)
            chosen = (lane < quota[:, None]) & (ordered.values > 0)
            counts[s] = torch.zeros_like(chosen, dtype=torch.int32).scatter_(1, ordered.indices, chosen.int()).sum(0)
    return counts


def _quota(positives: Tensor, tokens: int, rho: float, per_token: bool) -> Tensor:
    """How many neurons each token of a sample keeps, ``[T]`` int64."""
    if per_token:
        return (positives * rho + 1e-6).floor().long()
    return (positives.sum().to(wide(positives)) * rho / tokens + 1e-6).floor().long().expand_as(positives)


def reference_match(bits: Tensor, cores: Tensor, lens: Sequence[int]) -> Tensor:
    """`match` in plain PyTorch."""
    if bits.dtype != torch.int32:
        bits = reference_bits(bits)
    both = bits & cores[_samples(lens, bits.device)]
    value = both.to(torch.int64) & 0xFFFFFFFF
    value = value - ((value >> 1) & 0x55555555)
    value = (value & 0x33333333) + ((value >> 2) & 0x33333333)
    value = (value + (value >> 4)) & 0x0F0F0F0F
    return (((value * 0x01010101) & 0xFFFFFFFF) >> 24).sum(1).to(torch.int32)


def reference_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, ids: Tensor, act: str) -> Tensor:
    """`sparse_ffn` in plain PyTorch: gathers copies of the rows."""
    at = ids.clamp(min=0)
    inner = ACTIVATIONS[act](x @ gate[at].T) * (x @ up[at].T)
    return inner.masked_fill(ids < 0, 0.0) @ down[:, at].T


# -- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _words(act, row, word, size, stride, step, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words ``word ..`` of a row's bitmap."""
    neuron = (word + tl.arange(0, BLOCK))[:, None] * 32 + tl.arange(0, 32)[None, :]
    value = tl.load(act + row * stride + neuron * step, mask=neuron < size, other=0.0)
    return tl.sum(tl.where(value > 0, 1, 0) << tl.arange(0, 32)[None, :], 1)


@jit
def _bits_kernel(act, out, size, words, stride, step, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK
    lane = word + tl.arange(0, BLOCK)
    tl.store(out + row * words + lane, _words(act, row, word, size, stride, step, BLOCK), mask=lane < words)


@jit
def _ones(x):  # type: ignore[no-untyped-def]
    """Bits that are set in each int32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@jit
def _match_kernel(  # type: ignore[no-untyped-def]
    bits, cores, sample, out, size, words, stride, step, PACKED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    core = cores + tl.load(sample + row) * words
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for word in range(0, words, BLOCK):
        lane = word + tl.arange(0, BLOCK)
        if PACKED:
            mine = tl.load(bits + row * stride + lane * step, mask=lane < words, other=0)
        else:
            mine = _words(bits, row, word, size, stride, step, BLOCK)
        total += _ones(mine & tl.load(core + lane, mask=lane < words, other=0))
    tl.store(out + row, tl.sum(total, 0))


@jit
def _positives_kernel(act, out, size, stride, step, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for low in range(0, size, BLOCK):
        lane = low + tl.arange(0, BLOCK)
        value = tl.load(act + row * stride + lane * step, mask=lane < size, other=0.0)
        total += (value > 0).to(tl.int32)
    tl.store(out + row, tl.sum(total, 0))


@jit
def _counts_kernel(  # type: ignore[no-untyped-def]
    act, quota, sample, counts, size, stride, step, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Each token's `quota` largest positive activations, found by bisecting their bit patterns: they order like the
    numbers. BITS: patterns of halves end after as many; the lower ones are zeros."""
    row = tl.program_id(0).to(tl.int64)
    want = tl.load(quota + row)
    if want > 0:
        lane = tl.arange(0, BLOCK)
        value = tl.load(act + row * stride + lane * step, mask=lane < size, other=0.0).to(tl.float32)
        key = tl.where(value > 0, value, 0.0).to(tl.int32, bitcast=True)
        # The largest pattern that at least `want` of the keys reach.
        least = 0
        for bit in tl.static_range(BITS):
            trial = least | (1 << (30 - bit))
            reach = tl.sum((key >= trial).to(tl.int32), 0)
            least = tl.where(reach >= want, trial, least)
        above = key > least
        equal = (key == least) & (key > 0)
        left = want - tl.sum(above.to(tl.int32), 0)
        chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
        tl.atomic_add(counts + tl.load(sample + row) * size + lane, 1, mask=chosen & (lane < size), sem="relaxed")


@jit
def _gated_kernel(  # type: ignore[no-untyped-def]
    x, gate, up, ids, out, count, width, gate_f, up_f, ACT: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr
):
    """``act(gate x) * (up x)`` of BC neurons for one row of x, ``out [B, C]`` fp32."""
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    neuron = tl.load(ids + c, mask=c < count, other=-1)
    real = neuron >= 0
    lane = tl.arange(0, BD)
    one = tl.zeros([BC, BD], dtype=tl.float32)
    two = tl.zeros([BC, BD], dtype=tl.float32)
    for low in range(0, width, BD):
        d = low + lane
        here = real[:, None] & (d < width)[None, :]
        mine = tl.load(x + row * width + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
        one += tl.load(gate + neuron[:, None] * gate_f + d[None, :], mask=here, other=0.0).to(tl.float32) * mine
        two += tl.load(up + neuron[:, None] * up_f + d[None, :], mask=here, other=0.0).to(tl.float32) * mine
    # A dense FFN rounds in between: x is its dtype.
    g = tl.sum(one, 1).to(x.dtype.element_ty).to(tl.float32)
    u = tl.sum(two, 1).to(x.dtype.element_ty).to(tl.float32)
    if ACT == "silu":
        g = g / (1.0 + tl.exp(-g))
    elif ACT == "gelu":
        g = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        g = g / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    else:
        g = tl.maximum(g, 0.0)
    value = (g.to(x.dtype.element_ty).to(tl.float32) * u).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * count + c, tl.where(real, value, 0.0), mask=c < count)


@jit
def _down_kernel(  # type: ignore[no-untyped-def]
    inner, down, ids, out, count, width, span, down_d, down_f, BC: tl.constexpr, BD: tl.constexpr
):
    """``down[:, ids] inner`` over `span` neurons, ``out [parts, B, D]`` fp32."""
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    acc = tl.zeros([BC, BD], dtype=tl.float32)
    high = tl.minimum(count, (part + 1) * span)
    for low in range(part * span, high, BC):
        c = low + tl.arange(0, BC)
        neuron = tl.load(ids + c, mask=c < high, other=-1)
        value = tl.load(inner + row * count + c, mask=c < high, other=0.0)
        at = neuron[:, None] * down_f + d.to(tl.int64)[None, :] * down_d
        weight = tl.load(down + at, mask=(neuron >= 0)[:, None] & (d < width)[None, :], other=0.0)
        acc += value[:, None] * weight.to(tl.float32)
    to = out + (part * tl.num_programs(1) + row) * width + d
    tl.store(to, tl.sum(acc, 0), mask=d < width)


def _bits_triton(act: Tensor) -> Tensor:
    rows, size = act.shape
    words = -(-size // WORD)
    out = torch.empty(rows, words, dtype=torch.int32, device=act.device)
    if out.numel():
        block = min(64, triton.next_power_of_2(words))
        with device_of(act):
            _bits_kernel[(rows, -(-words // block))](act, out, size, words, *act.stride(), BLOCK=block, num_warps=4)
    return out


def _match_triton(bits: Tensor, cores: Tensor, lens: Sequence[int]) -> Tensor:
    rows, words = bits.shape[0], cores.shape[1]
    out = torch.zeros(rows, dtype=torch.int32, device=bits.device)
    if rows and words:
        packed = bits.dtype == torch.int32
        block = min(512 if packed else 64, triton.next_power_of_2(words))
        with device_of(bits):
            _match_kernel[(rows,)](
                bits, cores.contiguous(), _samples(lens, bits.device), out, bits.shape[1], words, *bits.stride(),
                PACKED=packed, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return out


def _counts_triton(act: Tensor, lens: Sequence[int], rho: float, per_token: bool) -> Tensor:
    rows, size = act.shape
    counts = torch.zeros(len(lens), size, dtype=torch.int32, device=act.device)
    if not rows or not size:
        return counts
    act = act if act.dtype in (torch.float32, torch.bfloat16, torch.float16) else act.float()
    sample = _samples(lens, act.device)
    positives = torch.empty(rows, dtype=torch.int32, device=act.device)
    block = triton.next_power_of_2(size)
    with device_of(act):
        _positives_kernel[(rows,)](act, positives, size, *act.stride(), BLOCK=min(block, 2048), num_warps=4)
        if per_token:
            quota = _quota(positives, 0, rho, True)
        else:
            sums = torch.zeros(len(lens), dtype=torch.int64, device=act.device).index_add_(0, sample, positives.long())
            quota = (sums.to(wide(sums)) * rho / on_device(lens, act.device) + 1e-6).floor().long()[sample]
            # No token has more than it has.
            quota = torch.minimum(quota, positives)
        bits = {torch.bfloat16: 15, torch.float16: 18}.get(act.dtype, 31)
        _counts_kernel[(rows,)](
            act, quota.to(torch.int32), sample, counts, size, *act.stride(), BITS=bits, BLOCK=block,
            num_warps=min(16, max(4, block // 1024)),
        )  # fmt: skip
    return counts


#: Neurons and numbers per program of the two products, warps of each.
_GATED = (1, 4096, 4)
_DOWN = (64, 64, 4)


def _ffn_triton(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, ids: Tensor, act: str) -> Tensor:
    rows, width = x.shape
    count = len(ids)
    if not rows or not count:
        return torch.zeros_like(x)
    x = x.contiguous()
    gate, up = (w if w.stride(1) == 1 else w.contiguous() for w in (gate, up))
    inner = torch.empty(rows, count, dtype=torch.float32, device=x.device)
    bc, bd, warps = _GATED
    with device_of(x):
        _gated_kernel[(-(-count // bc), rows)](
            x, gate, up, ids, inner, count, width, gate.stride(0), up.stride(0), ACT=act, BC=bc, BD=bd, num_warps=warps
        )
        bc, bd, warps = _DOWN
        columns = -(-width // bd)
        parts = max(1, min(-(-count // bc), 8 * processors(x) // (columns * rows)))
        span = -(-count // (parts * bc)) * bc
        parts = -(-count // span)
        out = torch.empty(parts, rows, width, dtype=torch.float32, device=x.device)
        _down_kernel[(columns, rows, parts)](
            inner, down, ids, out, count, width, span, *down.stride(), BC=bc, BD=bd, num_warps=warps
        )
    return out.sum(0).to(x.dtype)
