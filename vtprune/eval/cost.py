# SPDX-License-Identifier: Apache-2.0
"""What an answer costs: time to the first token, time to the last, memory; measured on single prompts, end to end.

A sweep encodes pictures once for all methods, so its own time says nothing about any of them. Here every method answers
a real prompt as a user would run it: vision tower, scoring, packing, prefill, decoding, one prompt at a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models import find_family
from . import runner
from .controls import prepare
from .table import Row
from .tasks import Example, Task

#: Timed answers to each prompt; before the first comes a token that allocates and picks kernels.
REPEATS = 2
PROMPTS = 2
MIB = 2**20


class Clock:
    """A streamer for generate() that notes when the first new token is there. Starts when it is made."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.first_token_ms = 0.0
        self.calls = 0
        self.elapsed_ms()
        self.start = time.perf_counter()

    def put(self, _tokens: Any) -> None:
        """Called with each token; the first call brings the prompt."""
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            self.first_token_ms = self.elapsed_ms()

    def end(self) -> None:
        """Nothing is left to do."""
        pass

    def elapsed_ms(self) -> float:
        """Milliseconds since the start, with the device idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - getattr(self, "start", time.perf_counter()))


class Peak:
    """The largest memory in use since it was made, in MiB: allocated on a GPU, resident of this process on Linux."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._reset()

    def _reset(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the largest resident size
            self.known = True
        except OSError:
            self.known = False

    def mib(self) -> float | None:
        """None where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB
        if not self.known:
            return None
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(
    model: Any,
    processor: Any,
    task: Task,
    examples: Sequence[Example],
    plans: Sequence[runner.Combination],
    repeats: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Time and memory of every combination, each prompt alone.

    Parameters
    ----------
    model, processor
        As for `runner.run`.
    task
        Says how long an answer may be.
    examples
        Prompts.
    plans
        Of `runner.combinations`.
    repeats
        Timed answers to each prompt; default `REPEATS`.
    say
        Is told of progress.

    Yields
    ------
    dict
        ``task, method, keep``; ``ttft_ms`` and ``total_ms``, medians over all timed answers, of the same answers;
        ``peak_mib``, the largest memory in use (None where unknown); ``prompts, repeats``.
    """
    family, repeats = find_family(model), repeats or REPEATS
    device = torch.device(model.device)
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": task.max_new_tokens}
    for method, keep in plans:
        say(f"{task.name}: time of {method.label} {keep}")
        first, total = [], []
        peak: Peak | None = None
        for example in examples:
            inputs = prepare(family, processor, [example])
            with runner.presented(family, processor, [example], inputs, method, keep) as (given, _):
                if peak is None:
                    model.generate(**given, **{**greedy, "max_new_tokens": 1})
                    peak = Peak(device)
                for _ in range(repeats):
                    clock = Clock(device)
                    model.generate(**given, **greedy, streamer=clock)
                    total.append(clock.elapsed_ms())
                    first.append(clock.first_token_ms)
        assert peak is not None
        yield {
            "type": "cost",
            "task": task.name,
            "method": method.label,
            "keep": keep,
            "ttft_ms": statistics.median(first),
            "total_ms": statistics.median(total),
            "peak_mib": peak.mib(),
            "prompts": len(examples),
            "repeats": repeats,
        }
