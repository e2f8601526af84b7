# SPDX-License-Identifier: Apache-2.0
"""The greedy kernels against the reference and by replay: in Triton's interpreter on a CPU, in full on a GPU.

fp32 rows must be picked as the reference picks them. Of half-precision rows each pick must score, given the picks
before it, almost as much as the best row does; the scores are computed anew in fp64.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from vtprune.kernels import reference as from_reference
from vtprune.kernels import select
from vtprune.kernels.select import Picks

pytest.importorskip("triton")
from vtprune.kernels import gram, greedy

# The interpreter computes with numpy, which warns of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

NAN, INF = math.nan, math.inf
ON_GPU = torch.cuda.is_available()

Op = Callable[..., Picks]
Lens = Sequence[int]

# All with one signature; importance in [0, 1].
OPS: dict[str, Op] = {
    "mmr": partial(select.mmr, lam=0.5),
    "mmr-9": partial(select.mmr, lam=0.9),
    "mmr-3": partial(select.mmr, lam=0.3, parallel_k=3),
    "max_min": lambda x, w, lens, counts, backend: select.max_min(x, lens, counts, backend),
    "sads": select.sads,
    "coverage": select.coverage,
    "dpp": select.dpp,
}
SINGLE = ("mmr", "mmr-9", "mmr-3", "max_min", "sads")  # the ops that have a kernel for fp32 rows
each_op = pytest.mark.parametrize("name", OPS)


def rows(n: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows in clusters with a part that all share, and importance in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    crowd = torch.randn(max(2, n // 8), dim, generator=generator)
    own = torch.randn(n, dim, generator=generator)
    x = crowd[torch.randint(len(crowd), (n,), generator=generator)] + own + torch.randn(dim, generator=generator)
    return x.to(dtype), torch.rand(n, generator=generator)


def triton(name: str, x: Tensor, w: Tensor, lens: Lens, counts: Lens) -> Picks:
    picks = OPS[name](x, w, lens=lens, counts=counts, backend="triton")
    assert torch.equal(picks.index, picks.order.sort().values)
    return picks


def reference(name: str, x: Tensor, w: Tensor, lens: Lens, counts: Lens) -> list[int]:
    return OPS[name](x, w, lens=lens, counts=counts, backend="torch").order.tolist()


def regret(name: str, x: Tensor, w: Tensor, picks: list[int]) -> float:
    """By how much a pick of one pool scores less than the best row, at most. fp64; relative for sums of cosines."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    w = w.double()
    cosine = unit @ unit.T
    alone = cosine.clone().fill_diagonal_(-2.0)
    closest, residual, covered = torch.full_like(w, -2.0), torch.ones_like(w), torch.zeros_like(w)
    columns: list[Tensor] = []
    lam, rounds = {"mmr": (0.5, 1), "mmr-9": (0.9, 1), "mmr-3": (0.3, 3)}.get(name, (0.0, 1))
    worst, score = 0.0, w.clone()
    for step, pick in enumerate(picks):
        if name == "max_min":
            score = -alone.amax(1) if step == 0 else -closest
        elif name == "sads":
            score = w if step == 0 else w * (1 - closest)
        elif name == "coverage":
            score = (cosine - covered).clamp(min=0).sum(1) * w
        elif name == "dpp":
            score = w * w * residual
        elif step % rounds == 0 and step:
            score = lam * w - (1 - lam) * closest
        score = score.clone()
        score[picks[:step]] = -INF
        best = float(score.max())
        worst = max(worst, (best - float(score[pick])) / (max(1.0, best) if name == "coverage" else 1.0))
        closest = torch.maximum(closest, cosine[pick])
        covered = torch.maximum(covered, cosine[pick])
        column = cosine[pick] - sum(((c * c[pick]) for c in columns), torch.zeros_like(w))
        column = column / residual[pick].clamp(min=1e-12).sqrt()
        columns.append(column)
        residual = residual - column * column
    return worst


def check(name: str, x: Tensor, w: Tensor, lens: Lens, counts: Lens) -> None:
    """Everything that is promised for sound rows."""
    picks = triton(name, x, w, lens, counts).order
    assert picks.shape == (sum(counts),) and picks.dtype == torch.int64 and picks.device == x.device
    if x.dtype == torch.float32:
        assert picks.tolist() == reference(name, x, w, lens, counts)
        return
    order, x, w = picks.tolist(), x.cpu(), w.cpu()
    done = 0
    for end, n, k in zip(accumulate(lens), lens, counts, strict=True):
        mine = [p - (end - n) for p in order[done : done + k]]
        done += k
        assert len(set(mine)) == k and all(0 <= p < n for p in mine)
        assert regret(name, x[end - n : end], w[end - n : end], mine) < 1e-3


# -- small, on any machine: the interpreter where there is no GPU ----------------------------------------------------

DEVICE = "cuda" if ON_GPU else "cpu"
#: The interpreter multiplies bf16 matrices wrongly.
HALVES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
RAGGED = ((9, 0, 1, 21, 2), (4, 0, 1, 9, 2))


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_ragged_pools(name: str, dtype: torch.dtype) -> None:
    x, w = rows(sum(RAGGED[0]), 20, dtype)
    check(name, x.to(DEVICE), w.to(DEVICE), *RAGGED)


@each_op
def test_the_regret_tells_a_wrong_pick(name: str) -> None:
    x, w = rows(30, 20)
    order = reference(name, x, w, [30], [8])
    # After the first pick, of which rounding may make a draw.
    rest = [p for p in range(30) if p not in order]
    assert regret(name, x, w, order) < 1e-5
    assert max(regret(name, x, w, [*order[:3], p]) for p in rest) > 2e-3


@pytest.mark.parametrize("name", [n for n in OPS if n != "mmr-3"])
def test_broken_rows_come_last_in_order(name: str) -> None:
    x, w = rows(14, 20, torch.float16)
    x[3], x[11] = NAN, torch.inf
    if name not in ("max_min",):
        w[5] = NAN
    broken = [3, 11] if name == "max_min" else [3, 5, 11]
    order = triton(name, x.to(DEVICE), w.to(DEVICE), [14], [14]).order.tolist()
    assert order[-len(broken) :] == broken and sorted(order) == list(range(14))
    sound = [i for i in range(14) if i not in broken]
    if name != "max_min":
        expected = triton(name, x[sound].to(DEVICE), w[sound].to(DEVICE), [len(sound)], [len(sound)]).order.tolist()
        assert order[: len(sound)] == [sound[i] for i in expected]


@each_op
def test_copies_tie_and_the_first_is_taken(name: str) -> None:
    # Whole numbers, so that the interpreter's products are exact too: it rounds by a row's place in memory.
    x, w = torch.randint(-3, 4, (6, 20)).half(), torch.rand(6)
    order = triton(name, torch.cat([x, x, x]).to(DEVICE), torch.cat([w, w, w]).to(DEVICE), [18], [18]).order.tolist()
    for i in range(6):
        mine = [p for p in order if p % 6 == i]
        assert mine == sorted(mine)


def test_importance_that_no_packed_key_can_hold() -> None:
    x, w = rows(20, 20, torch.float16)
    for scale in (1e3, 1e-6, -40.0):
        importance = (w * scale + 7).to(DEVICE)
        got = select.mmr(x.to(DEVICE), importance, [20], [12], 0.5, backend="triton").order.tolist()
        lam_w, closest = importance.double().cpu() * 0.5, torch.full((20,), -2.0, dtype=torch.float64)
        unit = torch.nn.functional.normalize(x.double(), dim=1)
        for step, pick in enumerate(got):
            score = (importance.double().cpu() if step == 0 else lam_w - 0.5 * closest).clone()
            score[got[:step]] = -INF
            assert float(score.max() - score[pick]) < 1e-3
            closest = torch.maximum(closest, unit @ unit[pick])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("rounds", [1, 2])
def test_importance_is_scaled_as_the_reference_scales_it(dtype: torch.dtype, rounds: int) -> None:
    lens, counts = (20, 0, 1, 9, 3), (12, 0, 1, 9, 2)
    x, w = rows(sum(lens), 20, dtype)
    w = 40 * w - 7
    w[2], w[5], w[9] = NAN, INF, -INF
    w[21:30] = -3.5  # all alike
    x, w = x.to(DEVICE), w.to(DEVICE)
    op: Any = partial(select.mmr, x, lens=lens, counts=counts, lam=0.6, parallel_k=rounds)
    got = op(w, minmax=True, backend="triton")
    assert torch.equal(got.order, op(from_reference.minmax(w, lens), backend="triton").order)
    assert torch.equal(got.index, got.order.sort().values)
    if dtype == torch.float32:
        assert torch.equal(got.order, op(w, minmax=True, backend="torch").order)


@each_op
@pytest.mark.parametrize("lens", [(), (0,), (3, 0, 2)])
def test_nothing_to_pick(name: str, lens: Lens) -> None:
    x, w = rows(sum(lens) + 2, 8, torch.float16)
    picks = triton(name, x[: sum(lens)].to(DEVICE), w[: sum(lens)].to(DEVICE), lens, (0,) * len(lens))
    assert picks.order.tolist() == []


@each_op
def test_lengths_and_counts_must_fit(name: str) -> None:
    x, w = rows(4, 8, torch.float16)
    for lens, counts in (((4,), (5,)), ((3,), (1,)), ((2, 2), (1,))):
        with pytest.raises(ValueError, match="rows"):
            triton(name, x.to(DEVICE), w.to(DEVICE), lens, counts)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of what no kernel may read."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(out: Tensor) -> Tensor:
        return out.fill_(-(2**15) + 1 if out.dtype == torch.int16 else -7 if not out.is_floating_point() else NAN)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: filled(empty_like(*a, **k)))


@each_op
def test_memory_that_was_not_written_is_not_read(name: str, poison: None) -> None:
    x, w = rows(sum(RAGGED[0]), 20, torch.float16)
    check(name, x.to(DEVICE), w.to(DEVICE), *RAGGED)


@each_op
def test_pools_that_do_not_fit_into_memory_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = (t.to(DEVICE) for t in rows(sum(RAGGED[0]), 20, torch.float16))
    expected = triton(name, x, w, *RAGGED).order
    monkeypatch.setattr(gram, "GRAM_BYTES", 700)
    assert torch.equal(triton(name, x, w, *RAGGED).order, expected)


def test_a_pool_too_large_for_a_kernel_is_picked_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = (t.to(DEVICE) for t in rows(sum(RAGGED[0]), 20, torch.float16))
    expected = triton("mmr", x, w, *RAGGED).order.tolist()
    monkeypatch.setattr(greedy, "MOST_ROWS", 10)
    got = triton("mmr", x, w, *RAGGED).order.tolist()
    slow = reference("mmr", x, w, *RAGGED)
    assert got[:5] == expected[:5] and got[5:14] == slow[5:14]


def test_cpu_tensors_run_in_pytorch_unless_told_otherwise() -> None:
    x, w = rows(12, 8)
    for name, op in OPS.items():
        assert op(x, w, lens=[12], counts=[5], backend="auto").order.tolist() == reference(name, x, w, [12], [5])


def test_a_launch_asks_triton_once() -> None:
    asked: list[Any] = []

    class Kernel:
        """What Triton shows of a kernel: the first `__getitem__` compiles, a variant's launches."""

        def __init__(self, name: str, variant: Any) -> None:
            self.name, self.variant = name, variant

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*args: Any, **options: Any) -> Any:
                asked.append((self.name, grid, args, options))
                return self.variant

            return run

    launch = gram.Launch(Kernel("jit", Kernel("variant", None)), (5, 2), (128, True), num_warps=4)
    launch("x", 1)
    launch("y", 2)
    launch("z", 3)
    assert asked == [
        ("jit", (5, 2), ("x", 1, 128, True), {"num_warps": 4}),
        ("variant", (5, 2, 1), ("y", 2, 128, True), {}),
        ("variant", (5, 2, 1), ("z", 3, 128, True), {}),
    ]
    # The interpreter has no variants.
    launch = gram.Launch(Kernel("interpreter", None), (1,), ())
    launch(1)
    launch(2)
    assert [name for name, *_ in asked[3:]] == ["interpreter"] * 2


def test_inputs_that_need_another_variant_have_another_plan() -> None:
    buffer, w = torch.zeros(9 * 32 + 8, dtype=torch.float16), torch.zeros(10)
    x = buffer[: 9 * 32].view(9, 32)

    def plan(x: Tensor, w: Tensor | None = None, counts: Lens = (4,)) -> gram.Plan:
        return gram.plan_of(x, w, (9,), tuple(counts), (True,))

    assert plan(x) is plan(x.clone())
    others = [
        plan(x), plan(x, counts=(5,)), plan(buffer[1:][: 9 * 32].view(9, 32)), plan(x.bfloat16()), plan(x[:, :16]),
        plan(x[:, :16].contiguous()), plan(x, w[:9]), plan(x, w[1:]), plan(x, w[:9].half()),
    ]  # fmt: skip
    assert len({id(p) for p in others}) == len(others)


def test_threads_share_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_MOST_PLANS", 4)
    x, failed, often = torch.zeros(40, 16, dtype=torch.float16), [], sys.getswitchinterval()

    def work(first: int) -> None:
        try:
            for i in range(600):
                gram.plan_of(x, None, (40,), ((first + 7 * i) % 37 + 1,), (True,))
        except Exception as error:
            failed.append(error)

    gram._PLANS.clear()
    sys.setswitchinterval(1e-6)  # without a lock most runs end with an error, or with too many plans
    try:
        threads = [threading.Thread(target=work, args=(13 * number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(often)
    assert not failed and len(gram._PLANS) == 4


def test_tiles_follow_the_work_of_all_pools() -> None:
    def side(n: int, pools: int) -> int:
        return gram.Plan((n,) * pools, (1,) * pools, (True,) * pools, torch.device("cpu")).tile[0]

    assert [side(576, 1), side(1296, 1), side(2880, 1), side(576, 8), side(1296, 8)] == [64, 64, 128, 128, 128]


# -- in full, on a GPU ------------------------------------------------------------------------------------------------

full = pytest.mark.gpu
SIZES = (1, 2, 127, 131, 577, 1300, 2881)


def on_gpu(n: int, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, w = rows(n, dim, dtype, seed)
    return x.cuda(), w.cuda()


@full
@each_op
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.float32, 200), (torch.float32, 577), (torch.bfloat16, 64), (torch.bfloat16, 577), (torch.float16, 200)],
    ids=str,
)
def test_odd_sizes(name: str, dtype: torch.dtype, dim: int) -> None:
    lens = (1, 0, 2, 127, 131, 577) if name in ("dpp", "coverage") else (1, 0, 2, 127, 131, 577, 1300)
    counts = [max(1, n // 5) if n else 0 for n in lens]
    x, w = on_gpu(sum(lens), dim, dtype)
    if dtype == torch.float32:
        # Random rows: no two scores so close that another order of summation decides.
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).cuda()
    check(name, x, w, lens, counts)


@full
@pytest.mark.parametrize(("name", "n"), [(o, n) for o in OPS for n in SIZES if n < 600 or o in SINGLE])
def test_all_rows_of_a_pool(name: str, n: int) -> None:
    x, w = on_gpu(n, 96, torch.bfloat16)
    order = triton(name, x, w, [n], [n]).order
    assert torch.equal(order.sort().values, torch.arange(n, device="cuda"))


@full
@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_rows(name: str, dtype: torch.dtype) -> None:
    x, w = on_gpu(400, 390, dtype)
    expected = triton(name, x[::2, ::3].contiguous(), w[::2].contiguous(), [200], [50]).order
    assert torch.equal(triton(name, x[::2, ::3], w[::2], [200], [50]).order, expected)
    expected = triton(name, x[:, 5:133].contiguous(), w, [400], [50]).order
    assert torch.equal(triton(name, x[:, 5:133], w, [400], [50]).order, expected)


@full
def test_a_whole_number_is_a_weight_too() -> None:
    x, w = on_gpu(150, 64, torch.bfloat16)
    op: Any = partial(select.mmr, x, w, [150], [30], backend="triton")
    ones, halves = op(1).order, op(0.5).order
    gram._PLANS.clear()
    assert torch.equal(op(0.5).order, halves) and torch.equal(op(1).order, ones)
    assert torch.equal(op(1.0).order, ones) and not torch.equal(ones, halves)


@full
@each_op
def test_rows_that_are_not_aligned(name: str) -> None:
    x, w = on_gpu(200, 128, torch.bfloat16)
    expected = triton(name, x, w, [200], [50]).order
    shifted, importance = torch.empty(200 * 128 + 8, dtype=x.dtype, device="cuda"), torch.empty(203, device="cuda")
    y, v = shifted[3 : 3 + 200 * 128].view(200, 128), importance[3:]  # of the same shape and strides
    y.copy_(x)
    v.copy_(w)
    assert torch.equal(triton(name, y, v, [200], [50]).order, expected)


@full
@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_alone_in_a_batch_and_again(name: str, dtype: torch.dtype) -> None:
    # Together they get larger tiles than each of them alone.
    lens, counts = (577, 1, 0, 144, 1030, 577, 700), (64, 1, 0, 144, 100, 200, 50)
    x, w = on_gpu(sum(lens), 256, dtype)
    x[577 + 1 + 20 : 577 + 1 + 40] = x[577 + 1 : 577 + 1 + 20]
    together = triton(name, x, w, lens, counts).order.tolist()
    assert triton(name, x, w, lens, counts).order.tolist() == together
    alone: list[int] = []
    for end, n, k in zip(accumulate(lens), lens, counts, strict=True):
        if k:
            alone += (
                triton(name, x[end - n : end].clone(), w[end - n : end].clone(), [n], [k]).order + end - n
            ).tolist()
    assert alone == together


@full
@each_op
def test_many_pools(name: str) -> None:
    lens, counts = (40,) * 300, (7,) * 300
    x, w = on_gpu(sum(lens), 64, torch.bfloat16)
    check(name, x, w, lens, counts)


@full
@pytest.mark.parametrize("name", SINGLE)
def test_the_largest_pools(name: str) -> None:
    n, k = 1 << 14, 40
    x, w = on_gpu(n, 128, torch.bfloat16)
    order = triton(name, x, w, [n], [k]).order.tolist()
    x, w = x.double(), w.double()
    unit = torch.nn.functional.normalize(x, dim=1)
    lam, closest, score = {"mmr": 0.5, "mmr-9": 0.9, "mmr-3": 0.3}.get(name), torch.full_like(w, -2.0), w.clone()
    for step, pick in enumerate(order):
        if step and (name != "mmr-3" or step % 3 == 0):
            score = w * (1 - closest) if name == "sads" else -closest if lam is None else lam * w - (1 - lam) * closest
        if step or name != "max_min":
            score[order[:step]] = -INF
            assert float(score.max() - score[pick]) < 1e-3
        closest = torch.maximum(closest, unit @ unit[pick])


@full
@each_op
def test_rows_beyond_two_to_the_31(name: str) -> None:
    width, total = 4096, (1 << 19) + 600
    if torch.cuda.mem_get_info()[0] < 3 * total * width:
        pytest.fail("needs 6 GiB of free GPU memory")
    x = torch.empty(total, width, dtype=torch.bfloat16, device="cuda")
    small, w = on_gpu(600, width, torch.bfloat16)
    x[-600:] = small
    importance = torch.zeros(total, device="cuda")
    importance[-600:] = w
    got = triton(name, x, importance, [total - 600, 600], [0, 60]).order - (total - 600)
    assert torch.equal(got, triton(name, small, w, [600], [60]).order)


@full
@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_op_waits_for_the_device(name: str, dtype: torch.dtype) -> None:
    x, w = on_gpu(300, 128, dtype)
    lens, counts = (200, 0, 100), (20, 0, 100)
    triton(name, x, w, lens, counts)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS[name](x, w, lens=lens, counts=counts, backend="triton")
        OPS[name](x, w, lens=(100, 200), counts=(3, 4), backend="triton")  # a shape not seen before
    finally:
        torch.cuda.set_sync_debug_mode("default")


@full
@each_op
def test_a_graph_replays_on_new_rows(name: str) -> None:
    lens, counts = (577, 0, 100), (64, 0, 100)
    x, w = on_gpu(sum(lens), 128, torch.bfloat16)
    op: Any = partial(OPS[name], lens=lens, counts=counts, backend="triton")
    op(x, w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(x, w)
    gram._PLANS.clear()  # the graph keeps what it needs
    for seed in (1, 2):
        y, v = on_gpu(sum(lens), 128, torch.bfloat16, seed)
        x.copy_(y)
        w.copy_(v)
        graph.replay()
        expected = op(y, v)
        assert torch.equal(captured.order, expected.order) and torch.equal(captured.index, expected.index)


@full
def test_pruners_on_a_gpu_pick_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import make_tokens

    from vtprune.budget import Budget
    from vtprune.registry import build

    ran: list[Any] = []
    pick = greedy.pick
    monkeypatch.setattr(greedy, "pick", lambda mode, *a, **k: ran.append(mode) or pick(mode, *a, **k))
    features = rows(36, 64, torch.bfloat16)[0].cuda()
    tokens = make_tokens([[[(6, 6)]]], features=features)
    for field in ("coords", "source"):
        object.__setattr__(tokens, field, getattr(tokens, field).cuda())
    for method in ("idpruner", "divprune"):
        selection = build(method, {}).select(tokens, Budget(9))
        assert len(selection) == 9 and torch.equal(selection.index, selection.order.sort().values)
    assert ran == [greedy.MMR, greedy.MAX_MIN]
