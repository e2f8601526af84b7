# SPDX-License-Identifier: Apache-2.0
"""CoreMatching's ops on FFN activations: bits of what fires, counts of what fires most, matches, and a sparse FFN."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .dispatch import resolve

#: Neurons per word of a bitmap; neuron ``32 w + b`` is bit b of word w.
WORD = 32


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
    sizes = torch.tensor(lens, dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(lens)), sizes).to(device, non_blocking=True)


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
    return (positives.sum().double() * rho / tokens + 1e-6).floor().long().expand_as(positives)


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
