# SPDX-License-Identifier: Apache-2.0
"""Thousands of calls of ``generate()`` with other inputs and another method each: memory flat, no hook left, nothing
carried over.

``make soak``, or ``PYTHONPATH=.:tests python -m fuzz.soak --calls 5000 --out benchmarks/results/soak-cpu.json``; on a
GPU with ``--device cuda``, where the CUDA allocator is watched too. Models are tiny and random. At checkpoints, with
garbage collected: what Python holds (tracemalloc), the resident set, how many objects and how many hooks there are.
After the last call the first ones are repeated, and must give the same bits.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import tiny
import torch
import transformers
from conformance.helpers import generate, hooks, twin
from torch import Tensor, nn

import vtprune
from vtprune.errors import VTPruneWarning

FAMILIES = ("llava", "qwen2_5_vl", "llava_onevision")
#: Every kind of method: scores, greedy, merging, inside the model, its own count, several; and none.
METHODS: tuple[Any, ...] = (
    "norm", None, "divprune", "fastv", "tome", "sparsevlm", "random", "corematching", "zoo", ("norm", "idpruner"),
    "grid", "pyramiddrop", "cdpruner", "visual-exit", "scope", "vispruner",
)  # fmt: skip
KEEPS = (0.25, 0.5, 3, 1.0, 1 / 9, 7)
#: Calls whose answers are compared at the end.
REPEATED = 24
#: Growth after the first fifth that is still flat: allocators and caches that are bounded settle.
MOST_PYTHON, MOST_RESIDENT = 256 << 10, 24 << 20


@dataclass(frozen=True)
class Checkpoint:
    """Bytes and counts after so many calls."""

    calls: int
    python: int
    resident: int
    objects: int
    hooks: int
    cuda: int = 0
    cuda_reserved: int = 0


def call(models: list[nn.Module], number: int) -> tuple[Tensor, Tensor]:
    """One call, which its number says everything about: the tokens, and the logits they were drawn from."""
    model = models[number % len(models)]
    device = next(model.parameters()).device
    # Prompts are made on the CPU, which may take a model of the family.
    maker = model if device.type == "cpu" else twin(FAMILIES[number % len(models)])
    prompts = [tiny.prompt(maker, (number + i) % 3 + (i == 0), seed=7 * number + i, end=4 + number % 5) for i in (0, 1)]
    inputs = tiny.collate(prompts[: 1 + number % 2])
    inputs = {name: value.to(device) for name, value in inputs.items()}
    method, keep = METHODS[number % len(METHODS)], KEEPS[number % len(KEEPS)]
    settings = {"keep": keep, "positions": "compact" if number % 7 == 0 else "original"}
    block = nullcontext() if method is None else vtprune.apply(model, method, **settings)
    if method is not None and number % 5 == 0:
        vtprune.remove(model)
        block = vtprune.using(model, method, **settings)  # type: ignore[assignment]
    with block:
        return generate(model, inputs, steps=2)


def count_hooks(models: list[nn.Module]) -> int:
    return sum(len(table) for model in models for state in hooks(model).values() for table in state[:-1])


def run(
    calls: int,
    every: int,
    device: str = "cpu",
    say: Callable[[Checkpoint], None] = lambda _: None,
    repeated: int = REPEATED,
) -> dict[str, Any]:
    """So many calls, looked at `every` so many, the first of which are `repeated` at the end."""
    models = [tiny.build(family) for family in FAMILIES]
    models = [model.to(device) for model in models]
    first = [call(models, number) for number in range(repeated)]
    process, seen, begin = psutil.Process(), [], time.perf_counter()
    tracemalloc.start()
    try:
        for number in range(repeated, calls + 1):
            if number % every == 0 or number == calls:
                gc.collect()
                python, _ = tracemalloc.get_traced_memory()
                cuda = (0, 0)
                if device != "cpu":
                    torch.cuda.synchronize()
                    cuda = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
                counts = len(gc.get_objects()), count_hooks(models)
                seen.append(Checkpoint(number, python, process.memory_info().rss, *counts, *cuda))
                say(seen[-1])
            if number < calls:
                call(models, number)
    finally:
        tracemalloc.stop()
    seconds = time.perf_counter() - begin
    again = [call(models, number) for number in range(repeated)]
    settled = [c for c in seen if c.calls >= calls / 5] or seen
    low, last = settled[0], settled[-1]
    growth = {name: getattr(last, name) - getattr(low, name) for name in ("python", "resident", "objects", "cuda")}
    return {
        "calls": calls,
        "device": torch.cuda.get_device_name() if device != "cpu" else f"CPU ({platform.machine()})",
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "families": FAMILIES,
        "methods": [m if isinstance(m, str | None) else "+".join(m) for m in METHODS],
        "repeated_bit_equal": all(
            torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True)
        ),
        "hooks_left": last.hooks - seen[0].hooks,
        "growth_after_a_fifth": growth,
        "flat": growth["python"] <= MOST_PYTHON and growth["resident"] <= MOST_RESIDENT and growth["cuda"] <= 0,
        "checkpoints": [asdict(c) for c in seen],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--every", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", VTPruneWarning)
    transformers.logging.set_verbosity_error()
    found = run(given.calls, given.every, given.device, lambda seen: print(seen, file=sys.stderr, flush=True))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "checkpoints"}, indent=1))
    return 0 if found["flat"] and found["repeated_bit_equal"] and not found["hooks_left"] else 1


if __name__ == "__main__":
    sys.exit(main())
