# SPDX-License-Identifier: Apache-2.0
"""Scoring and gathering: what `benchmarks.kernels` times of the other modules of `vtprune.kernels`.

``floor`` is the matrix product alone for `sensitivity` and `lens`, a copy of as many bytes for `pack`, one read of the
keys for `attention`, of the scores for `topk`, of the weights for `neurons`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.kernels import Work, register
from vtprune.kernels import attention_rows, lens_topk, neuron_match, pack, select, sensitivity

#: Images of LLaVA-1.5 (one), and LLaVA-NeXT (five views).
IMAGES = (576, 2880)
MATRIX_TFLOPS = 717.0  # 8192^3 in bf16 on the H100 that targets are for
DTYPE = torch.bfloat16


def normal(*shape: int, device: torch.device, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * scale).to(DTYPE)


# -- sensitivity of a two-layer projector -----------------------------------------------------------------------------


def projector(d_v: int, d_h: int, d: int, device: torch.device) -> sensitivity.Layers:
    inner = normal(d_h, d_v, device=device, scale=d_v**-0.5, seed=1)
    outer = normal(d, d_h, device=device, scale=d_h**-0.5, seed=2)
    return sensitivity.Layers(inner, normal(d_h, device=device, scale=0.1, seed=3), nn.GELU(), outer)


def naive_change(x: Tensor, layers: sensitivity.Layers, directions: Tensor, h: float) -> Tensor:
    """Two runs of the projector per direction, in half precision."""

    def run(rows: Tensor) -> Tensor:
        hidden = nn.functional.linear(rows, layers.inner, layers.bias)
        return nn.functional.linear(layers.act(hidden), layers.outer)

    total = x.new_zeros(x.shape[0], dtype=torch.float32)
    for u in directions.to(x.dtype):
        total += (run(x + h * u) - run(x - h * u)).float().norm(dim=1)
    return total / (2 * h * len(directions))


def add_change(estimator: str, n: int, m: int, widths: tuple[int, int, int], tiny: bool = False) -> None:
    d_v, d_h, d = widths
    target = None if tiny or estimator != "fd" else 2e-9 * m * n * d_h * d / (0.75 * MATRIX_TFLOPS)
    shape = f"{n} m={m} {d_v}-{d_h}-{d}"

    @register(f"sensitivity {estimator}", shape, None if target is None else float(f"{target:.3g}"), tiny)
    def make(device: torch.device) -> Work:
        x, layers = normal(n, d_v, device=device), projector(d_v, d_h, d, device)
        directions = nn.functional.normalize(normal(m, d_v, device=device, seed=4).float(), dim=1)
        # "bent": a step so long that the parabola is needed.
        h = {"fd": 0.01, "fd bent": 1.0, "jvp": 0.0}[estimator]
        passes = -(-m * n // (1 << 16))  # in shares, if all would not fit
        many = normal(-(-m * n // passes), d_h, device=device)

        def product() -> None:
            for _ in range(passes):
                torch.mm(many, layers.outer.T)

        naive = (lambda: naive_change(x, layers, directions, h)) if h else None
        short = layers._replace(outer=sensitivity.triangle(layers.outer))  # once per checkpoint
        return Work(
            lambda: sensitivity.mean_change(x, short, directions, h, triangular=True), naive, product, graph=True
        )


def add_frobenius(n: int, widths: tuple[int, int, int], target: float | None, tiny: bool = False) -> None:
    d_v, d_h, d = widths

    @register("sensitivity frobenius", f"{n} {d_v}-{d_h}-{d}", target, tiny)
    def make(device: torch.device) -> Work:
        x, layers = normal(n, d_v, device=device), projector(d_v, d_h, d, device)
        one, two = layers.inner.float(), layers.outer.float()
        gram = ((one @ one.T) * (two.T @ two)).to(DTYPE)
        hidden = normal(n, d_h, device=device)

        def naive() -> Tensor:
            at = nn.functional.linear(x, layers.inner, layers.bias)
            slope = torch.func.jvp(layers.act, (at,), (torch.ones_like(at),))[1]
            return ((slope @ gram) * slope).sum(1).clamp(min=0).div(d_v).sqrt()

        return Work(lambda: sensitivity.mean_square_change(x, layers, gram), naive, lambda: hidden @ gram, graph=True)


LLAVA, SMALL = (1024, 4096, 4096), (24, 32, 16)
for n, frobenius_target in zip(IMAGES, (0.15, 0.4), strict=True):
    add_change("fd", n, 64, LLAVA)
    add_change("fd bent", n, 64, LLAVA)
    add_change("jvp", n, 64, LLAVA)
    add_frobenius(n, LLAVA, frobenius_target)
add_change("fd", 9, 3, SMALL, tiny=True)
add_change("jvp", 9, 3, SMALL, tiny=True)
add_frobenius(9, SMALL, None, tiny=True)


# -- lens -------------------------------------------------------------------------------------------------------------


def vocabulary(n: int, v: int, d: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    table = torch.empty(v, d, dtype=DTYPE, device=device)
    for i, part in enumerate(table.split(1 << 14)):
        part.copy_(normal(*part.shape, device=device, seed=i))
    return normal(n, d, device=device, seed=99), table, lens_topk.inverse_norms(table)


def add_lens(n: int, v: int, d: int, tiny: bool = False) -> None:
    """Its target is 1.15 times the floor, of the same run."""

    @register("lens top-3", f"{n} V={v} D={d}", None, tiny)
    def top(device: torch.device) -> Work:
        x, table, inverse = vocabulary(n, v, d, device)
        unit = nn.functional.normalize(table, dim=1)
        return Work(
            lambda: lens_topk.lens_topk(x, table, 3, inverse=inverse),
            lambda: (nn.functional.normalize(x, dim=1) @ unit.T).topk(3, dim=1),
            lambda: x @ table.T,
            graph=True,
        )

    @register("lens rank of 3", f"{n} V={v} D={d}", None, tiny)
    def rank(device: torch.device) -> Work:
        x, table, inverse = vocabulary(n, v, d, device)
        anchors = torch.arange(3, device=device) * (v // 3)
        unit = nn.functional.normalize(table, dim=1)

        def naive() -> Tensor:
            cosine = nn.functional.normalize(x, dim=1) @ unit.T
            return torch.stack([(cosine > cosine[:, a : a + 1]).sum(1) for a in (0, v // 3, 2 * (v // 3))])

        return Work(
            lambda: lens_topk.lens_rank(x, table, anchors, inverse=inverse), naive, lambda: x @ table.T, graph=True
        )


add_lens(1296, 152064, 3584)
add_lens(576, 32064, 4096)
add_lens(7, 40, 16, tiny=True)


# -- pack -------------------------------------------------------------------------------------------------------------


def add_pack(batch: int, length: int, kept: int, d: int, features: int, tiny: bool = False) -> None:
    shape = f"{batch}x{kept} of {length} D={d}" + (f" +{features}" if features else "")

    @register("pack", shape, None, tiny)
    def make(device: torch.device) -> Work:
        hidden = normal(batch, length, d, device=device)
        more = [normal(batch, length, d, device=device, seed=i + 1) for i in range(features)]
        positions = torch.arange(length, device=device).expand(3, batch, -1).contiguous()
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randperm(length, generator=generator)[:kept].sort().values for _ in range(batch)]
        index, lens = torch.stack(rows).to(device), (kept,) * batch
        source = torch.empty(1 + features, batch, kept, d, dtype=DTYPE, device=device)
        target = torch.empty_like(source)

        def naive() -> list[Tensor]:
            wide = index[..., None].expand(-1, -1, d)
            moved = [x.gather(1, wide) for x in (hidden, *more)]
            return [*moved, positions.gather(2, index.expand(3, -1, -1)), torch.ones_like(index, dtype=torch.bool)]

        return Work(
            lambda: pack.pack(index.flatten(), lens, hidden, positions, more), naive, lambda: target.copy_(source),
            graph=True,
        )  # fmt: skip


add_pack(8, 2920, 2880, 4096, 0)
add_pack(8, 2920, 2880, 4096, 3)
add_pack(1, 640, 128, 4096, 0)
add_pack(2, 9, 5, 8, 1, tiny=True)


# -- attention rows ---------------------------------------------------------------------------------------------------


def naive_rows(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """The usual code: keys repeated for their groups, mean over heads and rows."""
    rows, length = query.shape[2], key.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ key.transpose(2, 3)).float() * query.shape[3] ** -0.5
    if causal:
        hidden = torch.ones(rows, length, dtype=torch.bool, device=key.device).triu(length - rows + 1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1).mean((1, 2))


def add_rows(name: str, shape: Sequence[int], causal: bool, tiny: bool = False) -> None:
    batch, heads, kv_heads, rows, length, d = shape

    @register(f"attention {name}", f"{batch}x{length} {heads}/{kv_heads}x{d} rows={rows}", None, tiny)
    def make(device: torch.device) -> Work:
        query = normal(batch, heads, rows, d, device=device)
        key = normal(batch, kv_heads, length, d, device=device, seed=1)
        slots = torch.arange(length - rows, length, device=device).expand(batch, -1).contiguous() if causal else None
        words = key.view(torch.int32)
        return Work(
            lambda: attention_rows.attention_rows(query, key, slots=slots, mean=rows > 1),
            lambda: naive_rows(query, key, causal),
            lambda: words.amax(),
            graph=True,
        )


add_rows("CLS", (5, 16, 16, 1, 577, 64), causal=False)
add_rows("CLS", (40, 16, 16, 1, 577, 64), causal=False)
add_rows("last query", (1, 32, 32, 1, 2940, 128), causal=True)
add_rows("last query", (8, 32, 32, 1, 2940, 128), causal=True)
add_rows("last query", (8, 28, 4, 1, 16384, 128), causal=True)
add_rows("text rows", (8, 32, 32, 40, 2940, 128), causal=True)
add_rows("text rows", (1, 28, 4, 40, 16384, 128), causal=True)
add_rows("CLS", (2, 2, 2, 1, 9, 16), causal=False, tiny=True)
add_rows("text rows", (2, 4, 2, 3, 9, 16), causal=True, tiny=True)


def add_logits(batch: int, heads: int, length: int, d: int, tiny: bool = False) -> None:
    """A CLS row before its softmax, of queries and keys as projections put them out."""

    @register("attention CLS logits", f"{batch}x{length} {heads}x{d}", None, tiny)
    def make(device: torch.device) -> Work:
        query = normal(batch, 1, heads, d, device=device).transpose(1, 2)
        key = normal(batch, length, heads, d, device=device, seed=1).transpose(1, 2)
        words = key.transpose(1, 2).view(torch.int32)
        return Work(
            lambda: attention_rows.attention_rows(query, key, softmax=False),
            lambda: ((query @ key.transpose(2, 3)).float() * d**-0.5).mean((1, 2)),
            lambda: words.amax(),
            graph=True,
        )


add_logits(1, 16, 577, 64)
add_logits(5, 16, 577, 64)
add_logits(40, 16, 577, 64)
add_logits(2, 2, 9, 16, tiny=True)


# -- the best of each pool --------------------------------------------------------------------------------------------


def add_topk(n: int, k: int, pools: int = 1, tiny: bool = False) -> None:
    @register("topk", f"{n}/{k}" + (f" x{pools}" if pools > 1 else ""), None, tiny)
    def make(device: torch.device) -> Work:
        scores, lens, counts = normal(pools * n, device=device).float(), (n,) * pools, (k,) * pools

        def naive() -> Tensor:
            """Two sorts: by score, ties to the lowest row, and of the rows."""
            best = scores.view(pools, n).sort(dim=1, descending=True, stable=True).indices[:, :k]
            return best.sort(dim=1).values

        return Work(lambda: select.topk(scores, lens, counts), naive, lambda: scores.amax(), graph=True)


for rows, picks in ((576, 64), (2880, 160), (4096, 1024), (16384, 4096)):
    add_topk(rows, picks)
    add_topk(rows, picks, 8)
add_topk(9, 3, 2, tiny=True)


# -- neurons ----------------------------------------------------------------------------------------------------------


def add_neurons(tokens: int, neurons: int, width: int, tiny: bool = False) -> None:
    @register("neurons top-rho counts", f"{tokens}x{neurons}", None, tiny)
    def counts(device: torch.device) -> Work:
        act = normal(tokens, neurons, device=device)
        words = act.view(torch.int32)

        def naive() -> Tensor:
            total = torch.zeros(neurons, device=device)
            for row in act.float():
                row = row.clamp(min=0)
                total[row.topk(max(1, neurons // 10)).indices] += 1
            return total

        return Work(lambda: neuron_match.top_counts(act, (tokens,)), naive, lambda: words.amax(), graph=True)

    @register("neurons match", f"{tokens}x{neurons}", None, tiny)
    def match(device: torch.device) -> Work:
        act = normal(tokens, neurons, device=device)
        words, wanted = act.view(torch.int32), torch.rand(neurons, device=device) < 0.4
        cores = neuron_match.pack_bits(wanted.float()[None])
        return Work(
            lambda: neuron_match.match(act, cores, (tokens,)), lambda: ((act > 0) & wanted).sum(1),
            lambda: words.amax(), graph=True,
        )  # fmt: skip

    @register("neurons sparse FFN", f"{width}-{neurons}-{width} 40%", None, tiny)
    def ffn(device: torch.device) -> Work:
        """Its naive form is the dense FFN: what there is to gain; gathering copies first is slower than that."""
        gate, up = (normal(neurons, width, device=device, scale=width**-0.5, seed=s) for s in (1, 2))
        down = normal(width, neurons, device=device, scale=neurons**-0.5, seed=3)
        apart, x = down.t().contiguous().t(), normal(1, width, device=device)
        order = torch.randperm(neurons, generator=torch.Generator().manual_seed(0))
        ids = order[: int(0.4 * neurons)].sort().values.to(device)
        share = normal(3 * len(ids), width, device=device).view(torch.int32)
        linear, silu = nn.functional.linear, nn.functional.silu
        return Work(
            lambda: neuron_match.sparse_ffn(x, gate, up, apart, ids),
            lambda: linear(silu(linear(x, gate)) * linear(x, up), down),
            lambda: share.amax(),
            graph=True,
        )


add_neurons(650, 11008, 4096)
add_neurons(5, 40, 16, tiny=True)
