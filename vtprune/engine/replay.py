# SPDX-License-Identifier: Apache-2.0
"""Work captured in CUDA graphs: capture, replay, and a shelf of graphs that share memory."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..kernels._jit import remember

#: Graphs kept per part of the model; the least recently used one makes room.
MAX_GRAPHS = 8
WARM_UP = 2


class Unfit(Exception):
    """Why something cannot run as a graph, in words."""


def obstacle(device: torch.device) -> str:
    """Why no graph can be captured on this device; empty where it can."""
    if device.type != "cuda":
        return f"the model is on the {device.type}, and CUDA graphs need a CUDA device"
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 5):
        return f"PyTorch is {torch.__version__}, and the graph needs 2.5 (grouped-query attention)"
    return ""


class Pool(NamedTuple):
    """Memory that graphs share, and the stream on which they are captured.

    One stream for all of them: cuBLAS keeps a workspace (32 MiB on Hopper) for each stream that it has ever run on.
    Graphs that may run at the same time have another: they would write to the same workspace.
    """

    handle: Any
    stream: Any


#: Streams whose graphs are gone, by device.
_IDLE: dict[torch.device, list[Any]] = {}


class Replay:
    """Work captured in a CUDA graph. Calling it launches the graph and returns the static tensors of the capture."""

    #: Whether `decoder_layer` is worth compiling where this runs.
    fuses = True

    def __init__(self, work: Callable[[], Any], device: torch.device, pool: Any) -> None:
        stream = pool.stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device meanwhile.
        with torch.cuda.graph(self.graph, pool=pool.handle, stream=stream, capture_error_mode="thread_local"):
            self.out = work()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.out

    @staticmethod
    def pool(device: torch.device) -> Pool:
        idle = _IDLE.get(device)
        with torch.cuda.device(device):
            return Pool(torch.cuda.graph_pool_handle(), idle.pop(0) if idle else torch.cuda.Stream(device))

    @staticmethod
    def pool_bytes(pool: Pool) -> int:
        """Bytes that the allocator holds for a pool."""
        return sum(
            s["total_size"]
            for s in torch.cuda.memory_snapshot()
            if tuple(s.get("segment_pool_id", ())) == tuple(pool.handle)
        )


@dataclass
class Captured:
    """One graph, with the buffers that it reads and writes."""

    replay: Any
    inputs: tuple[Tensor, ...]
    outputs: Any
    bytes: int
    read: Any = None  # other tensors whose addresses are part of the graph


class Shelf:
    """The graphs of one part of the model, captured on demand, least recently used first.

    Replays share one memory pool: nothing in it is needed after a replay, because results are copied out before the
    next one. That order also holds between streams (`run`).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = Replay.pool(device)
        self.graphs: OrderedDict[Any, Captured] = OrderedDict()
        self.refused: dict[Any, str] = {}
        self.lock = threading.Lock()
        self.done: Any = None
        self.closed = False
        self.about = ""

    def run(
        self, key: Any, make: Callable[[], Captured], fill: Callable[..., object], take: Callable[[Any], Any]
    ) -> Any:
        """Find or make the graph of `key`, ``fill(*inputs)``, replay it, and return what ``take(outputs)`` copies.

        Raises
        ------
        Unfit
            The graph cannot be captured; it is not tried again.
        """
        # Buffers are ordinary tensors even if the caller is in inference mode, so that both modes can use them.
        with self.lock, self._here(), torch.inference_mode(False), torch.no_grad():
            if self.closed:
                raise Unfit("it was taken off the model")
            if key in self.refused:
                raise Unfit(self.refused[key])
            if self.done is not None:
                torch.cuda.current_stream(self.device).wait_event(self.done)
            if key not in self.graphs:
                while len(self.graphs) >= MAX_GRAPHS:
                    if self.done is not None:
                        self.done.synchronize()  # it may be running
                    self.graphs.popitem(last=False)
                try:
                    self.graphs[key] = make()
                    self._count()
                except Exception as error:  # inductor, Triton and CUDA each raise their own
                    self.pool = Replay.pool(self.device)  # the allocator may still take the old one for being captured
                    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
                    remember(self.refused, key, f"capture failed ({type(error).__name__}: {reason})", 8 * MAX_GRAPHS)
                    raise Unfit(self.refused[key]) from error
            self.graphs.move_to_end(key)
            captured = self.graphs[key]
            try:
                fill(*captured.inputs)
                captured.replay()
                return take(captured.outputs)
            finally:  # also where there was no memory for what is taken: the replay is under way
                if self.device.type == "cuda":
                    self.done = torch.cuda.Event()
                    self.done.record(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        """Free the graphs, once the device is through with them; nothing runs here any more."""
        with self.lock:
            self.closed = True
            if self.done is not None:
                self.done.synchronize()
            self.graphs.clear()
            if self.pool is not None:
                _IDLE.setdefault(self.device, []).append(self.pool.stream)
                self.pool = None

    def _here(self) -> Any:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _count(self) -> None:
        """Say in words how many graphs there are, and what memory they hold."""
        static = sum(captured.bytes for captured in self.graphs.values())
        pool = Replay.pool_bytes(self.pool)
        self.about = f"{len(self.graphs)} captured, {static >> 20} MiB of buffers, {pool >> 20} MiB of pool"


def copied(out: Any) -> Any:
    """The same with every tensor in memory of its own."""
    leaves, spec = pytree.tree_flatten(out)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    copies = [torch.empty_like(t) for t in tensors]
    # One launch for each dtype: in a mixed list PyTorch copies tensor by tensor.
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        into, from_ = ([t for t in some if t.dtype == dtype] for some in (copies, tensors))
        torch._foreach_copy_(into, from_)
    fresh = iter(copies)
    return pytree.tree_unflatten([next(fresh) if isinstance(x, Tensor) else x for x in leaves], spec)
