# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs, and what is said where it is not the one that was asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vtprune.errors import ConfigError, VTPruneWarning
from vtprune.kernels import _jit, dispatch


class Elsewhere:
    """Stands for a tensor on a device that is not there."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


def on(device: str) -> Tensor:
    fake: Any = Elsewhere(device)
    return fake


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    dispatch._obstacle.cache_clear()
    dispatch._warn.cache_clear()


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    dispatch._obstacle.cache_clear()


def test_auto_is_pytorch_on_a_cpu() -> None:
    assert dispatch.resolve("auto", torch.ones(1)) == dispatch.resolve("torch", torch.ones(1)) == "torch"


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ConfigError, match="'cuda' is unknown; choose one of auto, triton, torch"):
        dispatch.resolve("cuda", torch.ones(1))


def test_triton_on_a_cpu_is_an_error_without_the_interpreter(no_interpreter: None) -> None:
    with pytest.raises(ConfigError, match="needs a CUDA GPU, not cpu"):
        dispatch.resolve("triton", torch.ones(1))


def test_triton_on_a_cpu_runs_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.resolve("triton", torch.ones(1)) == "triton"


def test_an_old_gpu_falls_back_with_one_warning(no_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.warns(VTPruneWarning, match=r"compute capability 7\.5, kernels need 8\.0"):
        assert dispatch.resolve("auto", on("cuda:0")) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.resolve("auto", on("cuda:0")) == "torch"
    with pytest.raises(ConfigError, match="compute capability"):
        dispatch.resolve("triton", on("cuda:0"))


def test_an_old_triton_falls_back(no_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from vtprune.kernels import _probe

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_probe, "run", lambda device: None)
    for version, backend in (("3.2.0", "torch"), ("2.3.1", "torch"), ("3.3.0", "triton"), ("3.10.0+git1", "triton")):
        monkeypatch.setattr(triton, "__version__", version)
        dispatch._obstacle.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert dispatch.resolve("auto", on("cuda:0")) == backend
        said = [str(w.message) for w in told if w.category is VTPruneWarning]
        assert [f"triton is {version}, kernels need 3.3" in text for text in said] == [True] * (backend == "torch")


def test_a_machine_that_cannot_compile_falls_back(no_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from vtprune.kernels import _probe

    def fail(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nMore lines.")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_probe, "run", fail)
    with pytest.warns(VTPruneWarning, match=r"cannot compile a kernel \(RuntimeError: Failed to find C compiler\.\)"):
        assert dispatch.resolve("auto", on("cuda:0")) == "torch"


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu() -> None:
    assert dispatch.resolve("auto", torch.ones(1, device="cuda")) == "triton"


def test_a_launch_is_kept_for_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton looks at the first call alone; another shape, grid, constant or number of warps is another first call."""
    monkeypatch.setattr(_jit, "_LAUNCHES", {})
    looked, ran = [], []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            def first(*args: Any, **options: Any) -> Any:
                looked.append((grid, args, options))
                return {(*grid, 1, 1)[:3]: lambda *again: ran.append(again)}

            return first

    kernel = Kernel()
    for args in ((1, 2), (3, 4)):
        _jit.launch(("shape",), kernel, (5,), args, (True,), 4)
    assert [args for _, args, _ in looked] == [(1, 2, True)] and ran == [(3, 4, True)]
    for shape, grid, constants, warps in (
        (("other",), (5,), (True,), 4),
        (("shape",), (6,), (True,), 4),
        (("shape",), (5,), (False,), 4),
        (("shape",), (5,), (True,), 8),
        (None, (5,), (True,), 4),
    ):
        before = len(looked)
        _jit.launch(shape, kernel, grid, (1, 2), constants, warps)
        assert len(looked) == before + 1
    assert len(ran) == 1
