# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs: its Triton kernel or its PyTorch reference."""

from __future__ import annotations

import functools
import os
import subprocess
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, VTPruneWarning

P = ParamSpec("P")
T = TypeVar("T")

BACKENDS = ("auto", "triton", "torch")

#: Compute capability below which there is no kernel: bf16 matrix products need Ampere.
_LEAST = (8, 0)
#: Triton below which there is none: older ones have no cooperative launches, and want other arguments for a variant
#: that was found (see `_jit.Launch`).
_LEAST_TRITON = (3, 3)


def resolve(backend: str, tensor: Tensor) -> str:
    """``"triton"`` or ``"torch"``: what runs an op on `tensor`.

    Parameters
    ----------
    backend
        ``"auto"``: Triton on a GPU that can, PyTorch elsewhere. What a CUDA tensor has no kernel for falls back to
        PyTorch, with one `VTPruneWarning` per process and reason. ``"triton"`` or ``"torch"``: that or an error.
    tensor : Tensor
        An input of the op; only its device counts.

    Raises
    ------
    ConfigError
        The backend is unknown, or ``"triton"`` and cannot run here.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and tensor.device.type != "cuda"):
        return "torch"
    reason = _failed or _obstacle(tensor.device.type, tensor.device.index)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ConfigError(f"backend='triton' cannot run here: {reason}; choose 'auto' or 'torch'")
    _warn(reason)
    return "torch"


#: Why a kernel could not be compiled or launched though others could, once one could not.
_failed = ""


def forgiving(op: Callable[P, T]) -> Callable[P, T]:
    """Decorator of an op: if its kernel cannot be compiled or launched here, no kernel runs in this process any more
    (`resolve` says so, in one warning), and the op runs again."""

    @functools.wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        global _failed
        try:
            return op(*args, **kwargs)
        except Exception as error:
            if interpreted() or not _of_compiler(error):
                raise
            _failed = _failed or f"a kernel failed ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        return op(*args, **kwargs)

    return run


#: What plain RuntimeErrors say that come from Triton's passes, LLVM, ptxas, or the search for a C compiler.
_COMPILERS = ("passmanager", "failed to translate", "ptxas", "llvm", "c compiler")


def _of_compiler(error: Exception) -> bool:
    """Whether an op's error is about making its kernel: Triton's own, a C compiler's, of the cache on the disk.

    What the device says of a kernel that runs is not: lack of memory, assertions, wrong addresses."""
    if type(error) is RuntimeError:
        said = str(error).lower()
        device = "cuda error" in said or "out of memory" in said
        return not device and any(word in said for word in _COMPILERS)
    own = type(error).__module__.partition(".")[0] == "triton"
    return own or isinstance(error, subprocess.CalledProcessError | OSError)


def interpreted() -> bool:
    """Triton kernels run in its interpreter, on any device: ``TRITON_INTERPRET=1`` in the environment at import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def half(rows: Tensor) -> bool:
    """Rows that go to the tensor cores as they are."""
    return rows.dtype in (torch.bfloat16, torch.float16)


@functools.cache
def _obstacle(kind: str, index: int | None) -> str | None:
    """Why Triton cannot run on a device; None where it can."""
    try:
        import triton
    except ImportError as error:
        return f"the package triton cannot be imported ({error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _LEAST_TRITON:
        return f"triton is {triton.__version__}, kernels need {'.'.join(map(str, _LEAST_TRITON))} (PyTorch 2.7 has it)"
    if interpreted():
        return None
    if kind != "cuda":
        return f"it needs a CUDA GPU, not {kind}"
    if torch.version.hip:
        return "its kernels are tested on NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, kernels need {_LEAST[0]}.{_LEAST[1]}"
    try:
        from ._probe import run

        run(torch.device(kind, index or 0))
    except Exception as error:  # no C compiler, a driver that does not fit: whatever keeps Triton from running
        first = str(error).partition("\n")[0]
        return f"triton cannot compile a kernel ({type(error).__name__}: {first})"
    return None


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"kernels run as plain PyTorch, which is slow: {reason}", VTPruneWarning, stacklevel=2)
