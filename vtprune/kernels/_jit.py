# SPDX-License-Identifier: Apache-2.0
"""Triton where it is installed. Without it kernels are defined, and never run: see `dispatch.resolve`."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .dispatch import interpreted

tl: Any
triton: Any
try:
    tl, triton = importlib.import_module("triton.language"), importlib.import_module("triton")
except ImportError:
    tl = triton = None


def jit(function: Any) -> Any:
    """``triton.jit``, or nothing."""
    return function if triton is None else triton.jit(function)


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make that the one of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def descriptor(x: Tensor, block: list[int]) -> Any:
    """A TMA descriptor of a matrix, for blocks of that shape; `describable` says of which."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, block)


def describable(*matrices: Tensor) -> bool:
    """TMA can load these matrices here: a Hopper GPU or later, a Triton that knows how, rows that start at 16 bytes."""
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401
    except ImportError:
        return False
    return all(
        x.stride(1) == 1
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        and min(x.shape) > 0
        and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0))
        for x in matrices
    )


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of the GPU of `x`; 2 for the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def multipliable(x: Tensor) -> Tensor:
    """`x`, in fp32 where Triton's interpreter, which cannot multiply bf16, is to do it."""
    return x.float() if interpreted() and x.dtype == torch.bfloat16 else x
