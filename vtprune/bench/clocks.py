# SPDX-License-Identifier: Apache-2.0
"""Clocks and counters: what one prefill takes, part by part, and what it holds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.attach import engine_of
from ..models import find_family

WARM_UP, MIN_RUNS, MAX_RUNS = 4, 10, 300


class Clock:
    """Marks on the device's own time line, read after the run: timing must not add synchronisation of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        """A point in time, for `milliseconds`."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Time between two marks, once the device has passed them."""
        return float(start.elapsed_time(end)) if self.on_gpu else 1000 * (end - start)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@dataclass
class Times:
    """Milliseconds of every timed run, by part; see `parts`."""

    runs: list[dict[str, float]] = field(default_factory=list)

    def quantile(self, part: str, q: float) -> float | None:
        """None where the part never ran."""
        values = [run[part] for run in self.runs if part in run]
        return round(float(np.quantile(values, q)), 4) if values else None


@contextmanager
def parts(model: nn.Module, clock: Clock) -> Iterator[dict[str, Any]]:
    """Within this block each forward leaves marks: ``vision`` and ``lm`` (start, end), ``score`` (a list of them).

    ``vision`` is the encoder without the projector where that is a module of its own; ``score`` is what pruners do;
    ``lm`` is the language model from after packing until before rows are put back. Enter it after `vtprune.apply`.
    """
    family = find_family(model)
    marks: dict[str, Any] = {"score": []}
    encoder = getattr(family.inner, "vision_tower", None) or family.inner.visual
    handles = []
    for name, module in (("vision", encoder), ("lm", family.lm)):
        # After the engine's own hook before a module, and before its own hook after it.
        start = module.register_forward_pre_hook(lambda *_, n=name: marks.__setitem__(n, [clock.mark()]))
        end = module.register_forward_hook(lambda *_, n=name: marks[n].append(clock.mark()), prepend=True)
        handles += [start, end]
    engine = engine_of(family)
    graphs = engine.graphs if engine is not None else None
    if graphs is not None:
        original = graphs.prefill

        def direct(*args: Any) -> Any:
            """Where the graph is run without the module that it stands for."""
            if len(marks.get("lm", ())) == 1:
                return original(*args)
            start = clock.mark()
            out = original(*args)
            marks["lm"] = [start, clock.mark()]
            return out

        graphs.prefill = direct  # type: ignore[assignment, method-assign]
    job = engine.job if engine is not None else None
    if job is not None:
        select = job.select

        def timed(*args: Any) -> Any:
            start = clock.mark()
            out = select(*args)
            marks["score"].append((start, clock.mark()))
            return out

        job.select = timed  # type: ignore[assignment, method-assign]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()
        if job is not None:
            del job.__dict__["select"]
        if graphs is not None:
            del graphs.__dict__["prefill"]


def read(marks: dict[str, Any], start: Any, end: Any, clock: Clock) -> dict[str, float]:
    """Milliseconds of the parts of one run; ``pack`` is what lies between vision tower and language model beside
    scoring: projector, text embeddings, the segment table, packing."""
    run = {"ttft": clock.milliseconds(start, end)}
    for name in ("vision", "lm"):
        if len(marks.get(name, ())) == 2:
            run[name] = clock.milliseconds(*marks[name])
    run["score"] = sum(clock.milliseconds(*pair) for pair in marks["score"])
    if "vision" in run and "lm" in run:
        between = clock.milliseconds(marks["vision"][1], marks["lm"][0])
        before = [pair for pair in marks["score"] if clock.milliseconds(pair[1], marks["lm"][0]) >= 0]
        run["pack"] = between - sum(clock.milliseconds(*pair) for pair in before)
    return run


@contextmanager
def no_collection() -> Iterator[None]:
    """Within this block Python looks for no cycles by itself, which takes milliseconds now and then."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def timed_runs(model: nn.Module, call: Callable[[], object], times: Times, count: int, warm_up: int) -> None:
    """Run `call` and add `count` runs to `times`."""
    clock = Clock(find_family(model).model.device)
    with parts(model, clock) as marks, torch.inference_mode(), no_collection():
        for _ in range(warm_up):
            call()
        for _ in range(count):
            marks["score"].clear()
            gc.collect(1)  # between two runs, so that none holds what another left; what is old takes long to look at
            clock.wait()
            start = clock.mark()
            call()
            end = clock.mark()
            clock.wait()
            times.runs.append(read(marks, start, end, clock))


def decode_ms(device: torch.device, prefill: Callable[[], Any], step: Callable[[Any], object], tokens: int) -> float:
    """Median milliseconds of a generated token after the first.

    The same steps are walked once before: some attention kernels (cuDNN's) are planned anew for each length of the
    cache, and only lines whose lengths another line had before would go without.
    """
    clock, times = Clock(device), []
    with torch.inference_mode():
        state = prefill()
        for _ in range(1 + tokens):
            step(state)
        state = prefill()
        step(state)  # the first one allocates
        for _ in range(tokens):
            clock.wait()
            start = clock.mark()
            step(state)
            end = clock.mark()
            clock.wait()
            times.append(clock.milliseconds(start, end))
    return round(statistics.median(times), 4)


def kv_bytes(cache: Any) -> int:
    """Bytes of keys and values in a dynamic cache."""
    tensors = (t for layer in cache.layers for t in (layer.keys, layer.values))
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def counted_flops(call: Callable[[], object], lm: str) -> tuple[int, int]:
    """FLOPs that PyTorch's counter sees in one call: of the language model (a class named `lm`), and in all.

    Graphs run as plain ops, and kernels of Triton are not seen.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
        """The CPU's own attention, which the counter does not know: two products over all pairs, as it counts."""
        return int(4 * np.prod(query) * key[-2])

    known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        call()
    by_module = counter.get_flop_counts()
    found = [sum(ops.values()) for name, ops in by_module.items() if name.split(".")[-1] in ("language_model", lm)]
    return max(found, default=0), counter.get_total_flops()


class Energy:
    """Joules that the GPU has used, from the driver's counter; needs the package nvidia-ml-py."""

    def __init__(self, device: torch.device) -> None:
        self.read: Callable[[], float] = lambda: float("nan")
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception:  # not installed, no driver library, a GPU without a counter
            return
        self.read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
