# SPDX-License-Identifier: Apache-2.0
"""Triton where it is installed. Without it kernels are defined, and never run: see `dispatch.resolve`."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Sequence
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


def jit(function: Any = None, *, volatile: Sequence[str] = ()) -> Any:
    """``triton.jit``, or nothing.

    Triton compiles a kernel anew for a whole number that is 1, or divides by 16, and one that does not. Those that
    change from prompt to prompt are `volatile`: one variant serves all of them.
    """
    if function is None:
        return functools.partial(jit, volatile=volatile)
    return function if triton is None else triton.jit(do_not_specialize=list(volatile))(function)


class Launch:
    """A kernel with its grid, constants (the last of its parameters) and options.

    The first call goes through Triton, which looks at every argument to find or compile the right variant: 20 to 30 us
    of host time, more than some kernels run. Later calls go straight to the variant that was found. So whatever decides
    on it, dtypes, alignment and whole numbers, must be the same in all calls; see `gram.plan_of`.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: tuple[Any, ...], **options: Any) -> None:
        self.kernel, self.grid, self.constants, self.options = kernel, grid, constants, options
        self.found: Any = None

    def __call__(self, *args: Any) -> None:
        if self.found is None:
            variant = self.kernel[self.grid](*args, *self.constants, **self.options)
            if variant is not None:  # the interpreter has none
                self.found = variant[(*self.grid, 1, 1)[:3]]
        else:
            self.found(*args, *self.constants)


_LAUNCHES: dict[tuple[Any, ...], Launch] = {}
_MOST_LAUNCHES = 128


def launch(
    shape: tuple[Any, ...] | None, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...],
    constants: tuple[Any, ...], warps: int,
) -> None:  # fmt: skip
    """Launch a kernel; as a `Launch` that is kept, where a `shape` is given that decides on what Triton looks at in
    `args`: device, dtypes, alignment, whole numbers that are not volatile."""
    if shape is None:
        kernel[grid](*args, *constants, num_warps=warps)
        return
    key = kernel, grid, constants, warps, shape
    found = _LAUNCHES.get(key)
    if found is None:
        found = Launch(kernel, grid, constants, num_warps=warps)
        remember(_LAUNCHES, key, found, _MOST_LAUNCHES)
    found(*args)


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make that the one of `x`."""
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(x.device)


def precise(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast of what is computed with `x`."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


_CHANGES = threading.Lock()


def remember(cache: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Put a value into a cache of at most `most` values, of which the oldest go first; from any thread."""
    with _CHANGES:
        while len(cache) >= most:
            cache.pop(next(iter(cache)))
        cache[key] = value


#: What `constant` has made: the tensors, and an event behind them until they are known to be there. The oldest go
#: first.
Constants = dict[tuple[Any, ...], tuple[tuple[Tensor, ...], Any]]
_MADE: Constants = {}
_MOST_MADE = 512
#: The same for large ones (plans of large ragged batches), of which there are few: 512 would fill a GPU. Those that
#: nobody asked for the longest go first.
_LARGE: Constants = {}
_MOST_LARGE, _LARGE_BYTES = 32, 1 << 18
#: Constants whose addresses are part of a captured graph: they must outlive it, and nobody tells when that ends.
_CAPTURED: list[tuple[Tensor, ...]] = []


def constant(
    key: tuple[Any, ...], device: torch.device, make: Callable[[], tuple[Tensor, ...]], made: Constants | None = None
) -> tuple[Tensor, ...]:
    """What `make` returns, made on `device` at its first use only. Not to be written to.

    Nobody waits for the device, whatever stream comes next, and a call can be captured in a CUDA graph once it has run.

    Parameters
    ----------
    key
        What the tensors depend on beside the device.
    made
        Where they are kept; by default with all others.
    """
    if torch._C._len_torch_dispatch_stack():  # made under a mode they may be of its kind: fake tensors, for example
        return make()
    if device.type == "cuda" and device.index is None:  # that is another one once the current device changes
        device = torch.device("cuda", torch.cuda.current_device())
    key = (*key, device)
    made = _MADE if made is None else made
    found = made.get(key)
    if found is None and made is _MADE:
        with _CHANGES:
            if key in _LARGE:
                made, found = _LARGE, _LARGE.pop(key)
                _LARGE[key] = found
    on_gpu = device.type == "cuda"
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    if found is None:
        with torch.inference_mode(False), torch.no_grad():  # or they could not be used again where gradients flow
            tensors = make()
        found = tensors, torch.cuda.current_stream(device).record_event() if on_gpu and not capturing else None
        if not capturing:  # inside a graph they have no content before the first replay
            large = made is _MADE and sum(tensor.nbytes for tensor in tensors) > _LARGE_BYTES
            if large:
                remember(_LARGE, key, found, _MOST_LARGE)
            else:
                remember(made, key, found, _MOST_MADE)
    elif (ready := found[1]) is not None and not capturing:  # a capture begins with a wait for everything
        if ready.query():
            with _CHANGES:
                if key in made:
                    made[key] = found[0], None
        else:
            torch.cuda.current_stream(device).wait_event(ready)
    if capturing:
        _CAPTURED.append(found[0])
    return found[0]


def on_device(numbers: Sequence[int], device: torch.device, repeat: bool = False) -> Tensor:
    """Host numbers as int64 on a device; with `repeat`, each index as often as its number says. See `constant`."""
    numbers = tuple(numbers)

    def make() -> tuple[Tensor, Tensor]:
        host = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        host = torch.repeat_interleave(host) if repeat else host
        return host.to(device, non_blocking=True), host  # kept: a graph that captured the copy reads it again

    return constant(("numbers", numbers, repeat), device, make)[0]


def descriptor(x: Tensor, block: list[int]) -> Any:
    """A TMA descriptor of a matrix, for blocks of that shape; `describable` says of which."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, block)


@functools.cache
def _loads_tiles(device: torch.device) -> bool:
    """TMA: a Hopper GPU or later, and a Triton that knows how."""
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401
    except ImportError:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def describable(*matrices: Tensor) -> bool:
    """TMA can load these matrices here: their rows start at 16 bytes."""
    return all(
        x.stride(1) == 1
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        and min(x.shape) > 0
        and _loads_tiles(x.device)
        for x in matrices
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of the GPU of `x`; 2 for the interpreter."""
    return _processors(x.device) if x.is_cuda else 2


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have; what Hopper has for the interpreter."""
    if device.type != "cuda":
        return 227 << 10
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 << 10))


def stages_for(x: Tensor, wanted: int, size: int) -> int:
    """As many stages of a pipeline as are `wanted`, if the GPU of `x` has shared memory for them; `size` in bytes."""
    return max(1, min(wanted, (_shared_memory(x.device) - 2048) // size))


def fits(x: Tensor, size: int) -> bool:
    """A program on the GPU of `x` can have `size` bytes of shared memory."""
    return size <= _shared_memory(x.device) - 2048


def multipliable(x: Tensor) -> Tensor:
    """`x`, in fp32 where Triton's interpreter, which cannot multiply bf16, is to do it."""
    return x.float() if interpreted() and x.dtype == torch.bfloat16 else x
