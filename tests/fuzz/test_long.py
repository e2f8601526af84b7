# SPDX-License-Identifier: Apache-2.0
"""Many calls, several threads, and what interrupts a forward: nothing stays behind."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from conformance.helpers import generate, hooks, later_hook, same, twin
from conformance.test_threads import THREAD_SAFE
from torch import nn

import vtprune
from vtprune.engine.attach import engine_of
from vtprune.models import find_family

from . import soak


@pytest.mark.filterwarnings("ignore::vtprune.errors.VTPruneWarning")
def test_calls_with_changing_inputs_and_methods_leave_nothing() -> None:
    """The short form of `make soak`."""
    # Every method has met every family before memory is looked at: what is imported or compiled once is no growth.
    found = soak.run(64, every=8, repeated=48)
    assert found["repeated_bit_equal"] and not found["hooks_left"]
    assert found["growth_after_a_fifth"]["python"] <= soak.MOST_PYTHON


class Work(threading.Thread):
    """A thread whose exception is not lost."""

    def __init__(self, work: Any) -> None:
        super().__init__()
        self.work, self.error = work, None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error


def together(*work: Any) -> None:
    threads = [Work(one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread in threads:
        if thread.error is not None:
            raise thread.error


def test_two_models_in_two_threads() -> None:
    kinds = [family for family in ("qwen2_vl", "llava") if family in THREAD_SAFE]
    models = [tiny.build(kinds[i % len(kinds)]) for i in range(2)]
    prompts = [tiny.prompt(model, 2, seed=i) for i, model in enumerate(models)]
    applied = [("norm", 0.3), ("fastv", 0.5)]
    alone = []
    for model, prompt, (method, keep) in zip(models, prompts, applied, strict=True):
        with vtprune.apply(model, method, keep=keep):
            alone.append(generate(model, prompt, 3)[1])
    clean = [hooks(model) for model in models]
    barrier = threading.Barrier(2)

    def work(i: int) -> None:
        barrier.wait()
        for _ in range(4):  # hooks go on one model while the other runs
            with vtprune.apply(models[i], applied[i][0], keep=applied[i][1]) as handle:
                assert same(generate(models[i], prompts[i], 3)[1], alone[i])
                assert handle.report().method == applied[i][0]

    together(*(functools.partial(work, i) for i in range(2)))
    assert [hooks(model) for model in models] == clean


def test_one_model_with_a_lock() -> None:
    model, lock = tiny.build("qwen2_vl"), threading.Lock()
    jobs = [("norm", 0.3), ("divprune", 5), ("fastv", 0.5)]
    prompts = [tiny.prompt(model, i, seed=i) for i in (1, 2, 3)]
    alone = []
    for prompt, (method, keep) in zip(prompts, jobs, strict=True):
        with vtprune.apply(model, method, keep=keep):
            alone.append(generate(model, prompt, 3)[1])
    clean = hooks(model)

    def work(i: int) -> None:
        for _ in range(3):
            with lock, vtprune.apply(model, jobs[i][0], keep=jobs[i][1]):
                assert same(generate(model, prompts[i], 3)[1], alone[i])

    together(*(functools.partial(work, i) for i in range(3)))
    assert hooks(model) == clean and same(
        generate(model, prompts[0], 3)[1], generate(twin("qwen2_vl"), prompts[0], 3)[1]
    )


@contextmanager
def failing(module: nn.Module, error: type[BaseException], at: int) -> Iterator[None]:
    """A module that raises in its call number `at`, from 0."""
    left = [at]

    def fail(kwargs: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error("told to fail")

    with later_hook(module, fail):
        yield


@functools.cache
def built() -> nn.Module:
    model = tiny.build("llava")
    generate(model, tiny.prompt(model, 2), 3)  # transformers itself installs some hooks at the first call
    return model


#: What fails, in which of its calls.
PLACES = {
    "the vision tower": (lambda model: model.model.vision_tower, 0),
    "a layer, at the prompt": (lambda model: tiny.decoder(model).layers[3], 0),
    "a layer, while decoding": (lambda model: tiny.decoder(model).layers[0], 2),
    "the head": (lambda model: model.lm_head, 0),
}


def test_what_interrupts_the_text_model_alone_leaves_nothing() -> None:
    model = tiny.build("llava")
    decoder, rows = tiny.decoder(model), torch.randn(1, 7, 32)
    with torch.no_grad():
        expected = decoder(inputs_embeds=rows).last_hidden_state
        with vtprune.apply(model, "fastv", keep=0.4):
            cache = model(**tiny.prompt(model, 2), use_cache=True).past_key_values
            with failing(decoder.layers[3], KeyboardInterrupt, 0), pytest.raises(KeyboardInterrupt):
                decoder(inputs_embeds=rows[:, :1], past_key_values=cache)
            assert same(decoder(inputs_embeds=rows).last_hidden_state, expected)


@pytest.mark.parametrize("method", ["norm", "fastv"])
@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
def test_what_interrupts_a_forward_leaves_nothing(place: str, error: type[BaseException], method: str) -> None:
    model, plain = built(), twin("llava")
    batch = tiny.collate([tiny.prompt(model, 2, 1), tiny.prompt(model, 1, 2)])
    rows = torch.randn(1, batch["input_ids"].shape[1], 32)
    find, at = PLACES[place]
    clean = hooks(model)
    with torch.no_grad(), vtprune.apply(model, method, keep=0.4):
        expected = generate(model, batch, 4)[1]
        before = hooks(model)
        for block in (None, "random"):
            with failing(find(model), error, at), pytest.raises(error, match="told to fail"):
                if block is None:
                    generate(model, batch, 4)
                else:
                    with vtprune.using(model, block, keep=0.5):
                        generate(model, batch, 4)
            assert hooks(model) == before
            if place != "the vision tower":  # the text model alone, which could be taken for the one that was cut off
                seen = tiny.decoder(model)(inputs_embeds=rows).last_hidden_state
                assert same(seen, tiny.decoder(plain)(inputs_embeds=rows).last_hidden_state)
            assert same(generate(model, batch, 4)[1], expected)
            engine = engine_of(find_family(model))
            assert engine is not None and engine.local.call is None
    assert hooks(model) == clean and engine_of(find_family(model)) is None
    assert same(generate(model, batch, 4)[1], generate(plain, batch, 4)[1])
