# SPDX-License-Identifier: Apache-2.0
"""What the demo computes, without a browser: budgets from one order, answers token by token, bounded memory."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
from vtprune import viz
from vtprune.api import make_config
from vtprune.demo import scenes, studio
from vtprune.demo.studio import Studio, checked_keep, in_order
from vtprune.errors import ConfigError, InputError

SCENE = scenes.draw("basic", 3)
QUESTION = "what does the text say ?"


@pytest.fixture(scope="module")
def work() -> Studio:
    return Studio()


@pytest.fixture(scope="module")
def look(work: Studio) -> studio.Look:
    return work.look("pocket-llava", (SCENE.picture,), QUESTION)


@pytest.mark.parametrize("method", ["idpruner", "divprune", "globalcom2", "norm", "random", "visionzip", "grid"])
def test_any_budget_is_a_prefix_of_one_order(look: studio.Look, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {k: viz.chosen(look.tokens, vtprune.select(look.tokens, method, keep=k)) for k in (0.01, 0.25, 0.6, 1.0)}
    look.choose(method, 0.5)  # asks the method once
    if look.orders[method].order is not None:
        monkeypatch.setattr(vtprune, "select", lambda *_, **__: pytest.fail("the scores were computed again"))
    for keep, wanted in expected.items():
        found = look.choose(method, keep)
        assert found.tokens_out == wanted.tokens_out
        for a, b in zip(found.segments, wanted.segments, strict=True):
            assert np.array_equal(a.kept, b.kept)
            assert (a.order is None) == (b.order is None)
            if a.order is not None:
                assert np.array_equal(a.order, b.order)


def test_the_answer_comes_with_what_it_cost(work: Studio, look: studio.Look) -> None:
    dense, nothing = work.answer_now(look, None)
    pruned, report = work.answer_now(look, make_config("idpruner", keep=0.25))
    assert dense.text == pruned.text == SCENE.answers[QUESTION] and nothing is None
    assert (dense.tokens, pruned.tokens) == (576, 144) and report.tokens_out == 144
    assert dense.done and 0 < dense.first_ms <= dense.total_ms and dense.peak_mib is None
    with vtprune.using(look.loaded.model, "idpruner", keep=0.25):
        look.loaded.model(**look.inputs)
        said = vtprune.report(look.loaded.model)
    assert (dense.flops, pruned.flops) == (said.flops_before, said.flops_after)
    # Keys and values: layers x 2 x rows x width, in fp32; the last token is never fed back.
    config = look.loaded.model.config.text_config
    rows = look.inputs["input_ids"].shape[1] + 3
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    assert dense.cache_mib == pytest.approx(config.num_hidden_layers * 2 * rows * width * 4 / 2**20, rel=0.01)
    overlay = look.choose("idpruner", 0.25)
    assert np.array_equal(overlay.segments[0].kept, report.segments[0].kept)


def test_it_streams_and_stops_when_nobody_listens(work: Studio, look: studio.Look) -> None:
    texts = [answer.text for answer, _ in work.answer(look, None)]
    assert len(texts) > 3 and texts[0] == SCENE.answers[QUESTION][0] and texts[-1] == SCENE.answers[QUESTION]
    stream = work.answer(look, None)
    next(stream)
    stream.close()
    assert work.answer_now(look, None)[0].done  # the worker is free again


def test_methods_inside_the_language_model_say_so(work: Studio, look: studio.Look) -> None:
    with pytest.raises(ConfigError, match="inside the language model"):
        look.choose("fastv", 0.25)
    assert work.answer_now(look, make_config("fastv", keep=0.25))[1].tokens_out == 144


def test_only_models_of_the_demo(work: Studio) -> None:
    for name in ("/etc", "..", "someone/model", ""):
        with pytest.raises(ConfigError, match="not among those of this demo"):
            work.load(name)


def test_looks_are_bounded_and_private(work: Studio, look: studio.Look) -> None:
    keys = [work.remember(look) for _ in range(studio.LOOKS + 5)]
    assert len(set(keys)) == len(keys) and min(map(len, keys)) >= 20
    assert [work.recall(key) is not None for key in keys] == [False] * 5 + [True] * studio.LOOKS
    work.forget(keys[-1])
    assert work.recall(keys[-1]) is None and work.recall(None) is None


def test_many_users_at_once_get_their_own_answers(work: Studio) -> None:
    own = [scenes.draw("basic", 100 + i) for i in range(6)]
    found: dict[int, tuple[str, str]] = {}

    def use(i: int) -> None:
        question, answer = next((q, a) for q, a in own[i].answers.items() if q.startswith(("what", "how")))
        mine = work.look("pocket-llava", (own[i].picture,), question)
        found[i] = work.answer_now(mine, make_config("idpruner", keep=0.5))[0].text, answer

    threads = [threading.Thread(target=use, args=(i,)) for i in range(len(own))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(text == answer for text, answer in found.values()), found


def test_clips(work: Studio) -> None:
    clip = scenes.clip(2)
    name = work.video_model()
    assert name == "pocket-qwen2.5-vl"
    times = [i / 2 for i in range(len(clip.frames))]
    question = "which way does the green star move ?"
    mine = work.look(name, clip.frames, question, times, 2.0)
    answer, report = work.answer_now(mine, make_config("idpruner", keep=0.25))
    assert answer.text == clip.answers[question] and report.tokens_in == 512
    assert mine.draw(mine.choose("idpruner", 0.25), "idpruner").width >= 700


def test_scenes_are_known_by_their_pixels() -> None:
    assert scenes.digest(SCENE.picture) == scenes.digest(scenes.draw("basic", 3).picture)
    changed = SCENE.picture.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert scenes.digest(changed) != scenes.digest(SCENE.picture)
    for world in scenes.WORLDS:
        assert scenes.draw(world, 1).answers
    assert scenes.worlds_of("pocket-llava") == ("basic", "extended", "clutter")
    assert scenes.worlds_of("other/model") == scenes.WORLDS


def test_small_things() -> None:
    assert in_order(["b", "norm", "a", "idpruner"]) == ["idpruner", "norm", "b", "a"]
    assert checked_keep(25) == 0.25
    for bad in (0, -1, 101, None, "25", True):
        with pytest.raises(InputError, match="cannot be kept"):
            checked_keep(bad)  # type: ignore[arg-type]


def test_a_picture_in_another_shape(work: Studio) -> None:
    mine = work.look("pocket-llava-next", (Image.new("RGB", (400, 200), "teal"),), QUESTION)
    report = mine.choose("norm", 0.25)
    assert {segment.kind for segment in report.segments} == {"thumbnail", "crop"}
    assert torch.is_tensor(mine.tokens.features) and mine.draw(report, "norm").width > 300
