# SPDX-License-Identifier: Apache-2.0
"""`using`: another method for one call, in one thread or task, on a model that others use at the same time."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
import transformers

import vtprune

from .helpers import COUNTS_THE_CACHE, KEEP, cache_lengths, generate, hooks, same, twin

JOBS: list[tuple[str, dict[str, Any]]] = [
    ("norm", {"keep": 0.25}),
    ("random", {"keep": 0.6, "seed": 5}),
    ("test-layers", {"keeps": {None: 0.7, 1: 0.3}}),
    ("divprune", {"keep": 3, "positions": "compact"}),
]


# transformers 5.0 replaces the forward of CLIP's layers during each call: stock LLaVA in two threads gives wrong logits
# there without vtprune, in 30 of 100 calls when it was measured.
_PATCHES_CLIP = COUNTS_THE_CACHE and transformers.__version__ >= "5"  # both: 5.0 and the next few
THREAD_SAFE = tiny.QWEN if _PATCHES_CLIP else tiny.FAMILIES


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("family", THREAD_SAFE)
def test_threads_with_different_methods_each_get_their_own(family: str, applied: bool) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2)
    generate(model, sample, 2)
    clean = hooks(model)
    if applied:
        vtprune.apply(model, "norm", keep=0.5)
    alone = []
    for method, options in JOBS:
        with vtprune.using(model, method, **options):
            alone.append(generate(model, sample, 4)[1])
    assert len({float(x.sum()) for x in alone}) == len(JOBS), "the methods do not differ"

    barrier = threading.Barrier(len(JOBS))
    failures: list[str] = []

    def work(i: int) -> None:
        method, options = JOBS[i]
        barrier.wait()
        for turn in range(2):
            try:
                with vtprune.using(model, method, **options):
                    _, logits = generate(model, sample, 4)
                    report = vtprune.report(model)
                if not same(logits, alone[i]) or report.method != method:
                    failures.append(f"{method}, turn {turn}: wrong result or report of {report.method}")
            except Exception as error:
                failures.append(f"{method}, turn {turn}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(JOBS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    if applied:
        with vtprune.using(model, "norm", keep=0.5):
            want = generate(model, sample, 3)[1]
        assert same(generate(model, sample, 3)[1], want), "the override outlived its block"
        vtprune.remove(model)
    assert hooks(model) == clean
    assert same(generate(model, sample, 3)[1], generate(twin(family), sample, 3)[1])


def test_a_thread_without_an_override_gets_what_is_applied() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2)
    results: dict[str, torch.Tensor] = {}
    entered, done = threading.Event(), threading.Event()

    def other() -> None:
        entered.wait()
        results["thread"] = generate(model, sample, 3)[1]
        done.set()

    with vtprune.apply(model, "norm", keep=0.5):
        applied = generate(model, sample, 3)[1]
        thread = threading.Thread(target=other)
        thread.start()
        with vtprune.using(model, "random", keep=0.2):
            entered.set()
            done.wait()
            mine = generate(model, sample, 3)[1]
        thread.join()
    assert same(results["thread"], applied) and not same(mine, applied)


@torch.no_grad()
def test_an_override_is_captured_when_the_prompt_is_run() -> None:
    """Decoding goes on with the settings of its prefill, inside another block, outside of any, or after an apply."""
    for family in tiny.FAMILIES:
        model = tiny.build(family)
        sample = tiny.prompt(model, 2)
        token = torch.tensor([[9]])
        with vtprune.using(model, "test-layers", keeps={None: 0.6, 1: 0.3}):
            cache = model(**sample, use_cache=True).past_key_values
            want = model(input_ids=token, past_key_values=cache).logits
        with vtprune.apply(model, "norm", keep=0.9):
            model(**sample)
            with vtprune.using(model, "test-layers", keeps={None: 0.6, 1: 0.3}):
                cache = model(**sample, use_cache=True).past_key_values
            before = cache_lengths(cache)
            with vtprune.using(model, "random", keep=0.2):
                got = model(input_ids=token, past_key_values=cache).logits
        assert same(got, want)
        assert cache_lengths(cache) == [n + 1 for n in before]


@torch.no_grad()
def test_overrides_nest_and_switch_off() -> None:
    model, plain = tiny.build("llava"), twin("llava")
    sample = tiny.prompt(model, 2)
    model(**sample)
    clean = hooks(model)
    with vtprune.using(model, "norm", keep=0.5):
        outer = model(**sample).logits
        with vtprune.using(model, "random", keep=0.2):
            assert not same(model(**sample).logits, outer)
            with vtprune.using(model, None):
                assert same(model(**sample).logits, plain(**sample).logits)
        assert same(model(**sample).logits, outer)
        with pytest.raises(KeyError), vtprune.using(model, "random", keep=0.2):
            raise KeyError
        assert same(model(**sample).logits, outer)
    assert hooks(model) == clean
    assert same(model(**sample).logits, plain(**sample).logits)


def test_an_override_belongs_to_one_model() -> None:
    one, other = tiny.build("llava"), tiny.build("llava")
    sample = tiny.prompt(one, 2)
    with torch.no_grad(), vtprune.using(one, "norm", keep=KEEP):
        assert not same(one(**sample).logits, other(**sample).logits)
        assert same(other(**sample).logits, twin("llava")(**sample).logits)


@torch.no_grad()
def test_tasks_of_one_event_loop_do_not_mix() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2)
    alone = {}
    for method in ("norm", "random"):
        with vtprune.using(model, method, keep=KEEP):
            alone[method] = model(**sample).logits

    async def task(method: str) -> None:
        with vtprune.using(model, method, keep=KEEP):
            for _ in range(3):
                await asyncio.sleep(0)
                assert same(model(**sample).logits, alone[method])

    async def both() -> None:
        await asyncio.gather(task("norm"), task("random"))

    with ThreadPoolExecutor(1) as pool:  # a browser test may have left this thread an event loop
        pool.submit(asyncio.run, both()).result()


@torch.no_grad()
def test_apply_and_remove_inside_an_override() -> None:
    model, plain = tiny.build("llava"), twin("llava")
    sample = tiny.prompt(model, 2)
    model(**sample)
    clean = hooks(model)
    with vtprune.using(model, "norm", keep=KEEP):
        mine = model(**sample).logits
        vtprune.apply(model, "random", keep=0.9)
        assert same(model(**sample).logits, mine), "an override goes before what is applied"
        with vtprune.using(model, "random", keep=0.9):
            model(**sample)
    assert not same(model(**sample).logits, mine)
    vtprune.remove(model)
    assert hooks(model) == clean and same(model(**sample).logits, plain(**sample).logits)
