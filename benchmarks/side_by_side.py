# SPDX-License-Identifier: Apache-2.0
"""Many small jobs side by side on one device: the pocket models are bound by kernel launches, not by the GPU."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from typing import Any

import torch

Job = dict[str, Any]


@lru_cache(maxsize=1)
def loaded(name: str) -> tuple[Any, Any]:
    """A model in fp32, on the GPU if there is one, and its processor; the last one asked for stays."""
    import vtprune

    return vtprune.load(name, dtype=torch.float32)


def default_workers() -> int:
    """As many processes as there are cores for, on a GPU; on a CPU one, which uses all of them."""
    return max(1, min(14, (os.cpu_count() or 2) - 2)) if torch.cuda.is_available() else 1


def side_by_side(
    work: Callable[..., Any], jobs: Sequence[Job], workers: int, seconds: float, say: Callable[[str], None] = print
) -> Iterator[tuple[Job, Any]]:
    """Call ``work(**job)`` for each job, in `workers` processes, in order; yield jobs with what came out, as they end.

    A job that fails costs itself only, and is told. After `seconds` no job is begun any more. With one worker all
    happens in this process.
    """
    begun = time.monotonic()
    if workers == 1:
        for job in jobs:
            if time.monotonic() - begun < seconds:
                try:
                    yield job, work(**job)
                except Exception:
                    say(f"failed: {job}\n{traceback.format_exc()}")
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _one_thread) as pool:
        # Real deadlines lie in `_begin`: the pool hands out jobs long before they begin.
        deadline = time.time() + seconds
        futures = {pool.submit(_begin, deadline, work, job): job for job in jobs}
        for done in as_completed(futures):
            if done.exception() is not None:
                say(f"failed: {futures[done]}\n" + "".join(traceback.format_exception(done.exception())))
            elif (found := done.result()) is not None:
                yield futures[done], found


def _one_thread() -> None:
    torch.set_num_threads(1)


def _begin(deadline: float, work: Callable[..., Any], job: Job) -> Any:
    return work(**job) if time.time() < deadline else None
