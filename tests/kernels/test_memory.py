# SPDX-License-Identifier: Apache-2.0
"""No memory left for scores: the same tokens all the same, with one warning; and kernels that do not compile."""

from __future__ import annotations

import errno
import gc
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from helpers import make_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vtprune
from vtprune.errors import ConfigError, InputError, VTPruneWarning
from vtprune.kernels import _jit, dispatch, memory, reference, select
from vtprune.pruners import zoo
from vtprune.tokens import PRE_PROJECTOR

N, K = 60, 9


class Small(TorchDispatchMode):
    """A device on which no tensor has more than so many elements."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.refused = most, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(size > 4 * self.most for size in sizes):
            self.refused += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 TiB.")
        return out


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    memory._warn.cache_clear()
    yield
    memory._warn.cache_clear()


def told(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = call()
    return found, [str(w.message) for w in caught if w.category is VTPruneWarning]


rows = torch.randn(N + 7, 5, generator=torch.Generator().manual_seed(0))
weight = torch.rand(N + 7, generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Callable[[], Tensor]] = {
    "mmr": lambda: reference.mmr(rows, weight, (N, 7), (K, 2), 0.5, 2),
    "max_min": lambda: reference.max_min(rows, (N, 7), (K, 2)),
    "sads": lambda: reference.sads(rows, weight, (N, 7), (K, 2)),
    "dpp": lambda: select.slow_dpp(rows, weight, (N, 7), (K, 2)),
}


@pytest.mark.parametrize("op", GREEDY)
def test_without_room_for_all_pairs_the_picks_are_the_same(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = GREEDY[op]()
    monkeypatch.setattr(reference, "BLOCK_ROWS", 8)
    with Small(N * 40) as device:
        found, said = told(GREEDY[op])
    assert device.refused > 0 and torch.equal(found, expected)
    assert len(said) == 1 and "column by column" in said[0]


PROJECTOR = sorted(
    name
    for name, cls in vtprune.methods().items()
    if all(stage.layer is None for stage in cls().stages()) and name not in ("embedlens", "selector")
)


@pytest.mark.parametrize("method", PROJECTOR)
def test_a_method_that_runs_out_of_memory_is_run_on_the_cpu(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = make_tokens([[[(4, 5)], [(3, 3)]], [[(6, 6)]]], cls_row=True)
    projector = torch.nn.Linear(8, 8).requires_grad_(False)
    tokens = replace(tokens, projector=projector).with_probes({PRE_PROJECTOR: tokens.features})
    config = vtprune.PruneConfig(method, 0.3)
    expected = vtprune.select(tokens, config)
    cls = vtprune.methods()[method]
    original, tries = cls.select, []

    def select_once(self: Any, given: Any, *rest: Any) -> Any:
        tries.append(given)
        if len(tries) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(self, given, *rest)

    monkeypatch.setattr(cls, "select", select_once)
    found, said = told(lambda: vtprune.select(tokens, config))
    assert len(tries) == 2 and len(said) == 1 and "the CPU chooses" in said[0] and "\n" not in said[0]
    assert torch.equal(found.index, expected.index)
    assert found.features is None or torch.equal(found.features, expected.features)
    tries.clear()
    assert told(lambda: vtprune.select(tokens, config))[1] == [], "said once"


@pytest.mark.parametrize("method", ["divprune", "sparsevlm", "catp", "fastv"])
@torch.no_grad()
def test_a_forward_goes_on(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what a stage notes for the next one arrives there."""
    model = tiny.build("llava")
    batch = tiny.collate([tiny.prompt(model, 2, 1), tiny.prompt(model, 1, 2)])
    with vtprune.apply(model, method, keep=0.4):
        expected = model(**batch).logits
    cls = vtprune.methods()[method]
    original, seen = cls.select, []

    def every_first(self: Any, tokens: Any, *rest: Any) -> Any:
        seen.append(tokens)
        if len(seen) % 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(self, tokens, *rest)

    monkeypatch.setattr(cls, "select", every_first)
    with vtprune.apply(model, method, keep=0.4):
        assert torch.equal(model(**batch).logits, expected)
    assert len(seen) >= 2 and len(seen) % 2 == 0


def test_a_second_failure_comes_out() -> None:
    def fail() -> None:
        raise torch.cuda.OutOfMemoryError("again")

    with pytest.warns(VTPruneWarning), pytest.raises(torch.cuda.OutOfMemoryError, match="again"):
        memory.spare(fail, fail, "it is tried again")


def test_nothing_of_the_first_attempt_is_held_while_the_second_runs() -> None:
    """An exception holds its frames, and these their tensors: what was too much would still be there."""
    held: list[weakref.ref[Tensor]] = []

    def first() -> bool:
        large = torch.zeros(9)
        held.append(weakref.ref(large))
        raise torch.cuda.OutOfMemoryError

    def then() -> bool:
        return held[0]() is None

    gc.disable()
    try:
        with pytest.warns(VTPruneWarning):
            assert memory.spare(first, then, "x")
    finally:
        gc.enable()


def test_the_projector_is_asked_about_a_few_tokens_at_a_time() -> None:
    projector = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    tokens = make_tokens([[[(16, 16)]]])
    tokens = replace(tokens, projector=projector.requires_grad_(False))
    tokens = tokens.with_probes({PRE_PROJECTOR: tokens.features})
    pruner = zoo.ZooPruner(m=8)
    expected = pruner.score(tokens)
    with Small(256 * 16 * 8 * 2 - 1) as device:
        found, said = told(lambda: pruner.score(tokens))
    assert device.refused > 0 and len(said) == 1
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_a_full_gpu() -> None:
    """Real memory, all but a little of it taken: large pools are pruned by what is left, and by the CPU."""
    device = torch.device("cuda")
    rows = torch.randn(4096, 32, device=device)
    weight = torch.rand(4096, device=device)
    tokens = make_tokens([[[(64, 64)]]], features=rows, cls_row=weight.cpu()).to(device)
    expected = {m: vtprune.select(tokens, m, keep=64).index.cpu() for m in ("divprune", "scope", "tome", "vispruner")}
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (24 << 20)) / total)
    try:
        with pytest.warns(VTPruneWarning, match="no memory is left"):
            for method, index in expected.items():
                assert torch.equal(vtprune.select(tokens, method, keep=64).index.cpu(), index), method
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# -- kernels ----------------------------------------------------------------------------------------------------------


class CompilationError(Exception):
    """Stands for what Triton raises."""


CompilationError.__module__ = "triton.compiler.errors"


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A GPU on which the smallest kernel runs, and no other."""
    calls: list[str] = []

    def op(x: Tensor, backend: str = "auto") -> str:
        calls.append(dispatch.resolve(backend, x))
        if calls[-1] == "triton":
            raise CompilationError("at 3:4:\nout of registers")
        return "slow"

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(dispatch, "_failed", "")
    monkeypatch.setattr(dispatch, "_obstacle", lambda kind, index: None)
    monkeypatch.setattr(select, "op", dispatch.forgiving(op), raising=False)
    dispatch._warn.cache_clear()
    yield calls
    dispatch._warn.cache_clear()


class Elsewhere:
    device = torch.device("cuda:0")


def test_a_kernel_that_does_not_compile_is_done_in_pytorch(broken_compiler: list[str]) -> None:
    x: Any = Elsewhere()
    run: Any = select.op  # type: ignore[attr-defined]
    found, said = told(lambda: [run(x), run(x)])
    assert found == ["slow", "slow"] and broken_compiler == ["triton", "torch", "torch"]
    assert len(said) == 1 and "CompilationError: at 3:4:" in said[0] and "plain PyTorch" in said[0]
    with pytest.raises(ConfigError, match="backend='triton' cannot run here: a kernel failed"):
        run(x, backend="triton")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("PassManager::run failed"),
        RuntimeError("failed to translate module to LLVM IR"),
        RuntimeError("`ptxas` failed with error code 255"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "gcc"),
    ],
    ids=str,
)
def test_whatever_keeps_a_kernel_from_being_made(
    error: Exception, broken_compiler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @dispatch.forgiving
    def op(x: Tensor) -> str:
        if dispatch.resolve("auto", x) == "triton":
            raise error
        return "slow"

    x: Any = Elsewhere()
    found, said = told(lambda: [op(x), op(x)])
    assert found == ["slow", "slow"] and len(said) == 1
    assert f"a kernel failed ({type(error).__name__}: " in said[0] and "plain PyTorch" in said[0]


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        ValueError("LLVM"),
        ConfigError("keep=0 with LLVM"),
        InputError("PassManager"),
        torch.OutOfMemoryError("CUDA out of memory while LLVM"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: device-side assert triggered\nCompile with LLVM"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        NotImplementedError("ptxas"),
    ],
    ids=repr,
)
def test_other_errors_of_an_op_come_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    @dispatch.forgiving
    def op() -> None:
        calls.append(1)
        raise error

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(type(error)) as caught:
        op()
    assert caught.value is error and calls == [1] and dispatch._failed == ""


def test_without_triton_pytorch_runs_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    dispatch._obstacle.cache_clear()
    dispatch._warn.cache_clear()
    x: Any = Elsewhere()
    try:
        found, said = told(lambda: [dispatch.resolve("auto", x) for _ in range(3)])
        assert found == ["torch"] * 3 and len(said) == 1 and "triton cannot be imported" in said[0]
    finally:
        dispatch._obstacle.cache_clear()
        dispatch._warn.cache_clear()


def test_few_large_constants_are_kept() -> None:
    """512 plans of large ragged batches would fill a GPU."""
    cpu = torch.device("cpu")
    for number in range(40):
        first = _jit.constant(("large", number), cpu, lambda: (torch.zeros(_jit._LARGE_BYTES),))
        again = _jit.constant(("large", number), cpu, lambda: (torch.ones(1),))
        assert again[0] is first[0]
        kept = _jit.constant(("large", 0), cpu, lambda: (torch.ones(1),))
        assert kept[0].numel() > 1  # asked for all the time, so never gone
    assert len(_jit._LARGE) <= _jit._MOST_LARGE
    assert not any(sum(t.nbytes for t in found[0]) > _jit._LARGE_BYTES for found in _jit._MADE.values())
    small = _jit.constant(("small",), cpu, lambda: (torch.zeros(3),))
    assert any(found[0] is small for found in _jit._MADE.values())
