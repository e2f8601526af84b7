# SPDX-License-Identifier: Apache-2.0
"""The real, unmodified lmms-eval: it finds our model, runs it on exported tasks, and both sides say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vtprune.errors import ConfigError, InputError
from vtprune.eval import runner, sweep
from vtprune.eval.tasks import get

pytest.importorskip("lmms_eval")
from vtprune.eval import lmms

COUNT = 4
TASKS = {"pocketvqa/basic": "pocketvqa_basic", "easy-vqa": "easy_vqa"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lmms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
        for name, there in TASKS.items():
            assert lmms.export(name, place, count=COUNT) == there
    return place


def test_its_registry_finds_us() -> None:
    from lmms_eval.models import get_model, list_available_models

    assert "vtprune" in list_available_models()
    assert get_model("vtprune").__module__ == "vtprune.eval.lmms_model"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "norm"])
def test_it_runs_us_and_says_the_same(folder: Path, tmp_path: Path, method: str) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", str(folder), include_defaults=False)
    keep = "1/18"
    given = f"pretrained=pocket-llava,method={method},dtype=float32" + (f",keep={keep}" if method != "dense" else "")
    found = simple_evaluate(
        "vtprune", given, tasks=[*TASKS.values()], batch_size=3, device="cpu", task_manager=manager, log_samples=True
    )
    out = tmp_path / "ours.jsonl"
    settings: dict[str, Any] = {"split": "test", "count": COUNT, "batch": 3, "device": "cpu"}
    runner.evaluate("pocket-llava", [*TASKS], [method], [keep], out, **settings)
    ours = runner.read(out)[1]
    assert len(ours) == COUNT * len(TASKS)
    for name, there in TASKS.items():
        own = [row for row in ours if row["task"] == name]
        theirs = sorted(found["samples"][there], key=lambda sample: sample["doc_id"])
        assert [row["prediction"] for row in own] == [sample["filtered_resps"][0] for sample in theirs]
        assert [row["answer"] for row in own] == [sample["target"] for sample in theirs]
        assert [row["score"] for row in own] == [sample["exact"] for sample in theirs]
        assert found["results"][there]["exact,none"] == sum(row["score"] for row in own) / COUNT
    if method == "norm":
        assert 0 < sum(row["score"] for row in ours) < len(ours)  # or equality says little


@pytest.mark.slow
def test_its_tasks_stand_on_our_board(folder: Path, tmp_path: Path) -> None:
    name = f"lmms:pocketvqa_basic@{folder}"
    rows = {}
    for task, split in ((name, "test"), ("pocketvqa/basic", "test")):
        out = tmp_path / f"{sweep.slug(task)}.jsonl"
        settings: dict[str, Any] = {"split": split, "count": COUNT, "batch": 3, "device": "cpu"}
        runner.evaluate("pocket-llava", [task], ["dense", "norm", "blank"], ["1/9"], out, **settings)
        rows[task] = [(r["method"], r["prediction"], r["score"], r["tokens_out"]) for r in runner.read(out)[1]]
    assert rows[name] == rows["pocketvqa/basic"]
    assert {score for _, _, score, _ in rows[name]} == {0, 1}


def test_its_examples_are_ours_to_the_pixel(folder: Path) -> None:
    for name, there in TASKS.items():
        ours = list(get(name).examples("test", COUNT, 0))
        theirs = list(get(f"lmms:{there}@{folder}").examples("test", COUNT, 0))
        for a, b in zip(ours, theirs, strict=True):
            assert a.answer == b.answer and len(a.messages) == len(b.messages)
            assert [p["text"] for p in a.parts("text")] == [p["text"] for p in b.parts("text")]
            for x, y in zip(a.parts("image"), b.parts("image"), strict=True):
                assert x["image"].convert("RGB").tobytes() == y["image"].tobytes()
            assert b.scorer is not None and b.scorer(a.answer) == 1 and b.scorer("nothing") == 0


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    for name, words in (
        (f"lmms:pocketvqa_basik@{folder}", "did you mean 'pocketvqa_basic'"),
        (f"lmms:x@{tmp_path / 'no'}", "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            get(name)
    with pytest.raises(InputError, match="cannot be exported"):
        lmms.export("pocketvqa/video", tmp_path, count=1)
    from vtprune.eval.lmms_model import VTPrune

    for settings, words in (
        ({"method": "nrom"}, "did you mean 'norm'"),
        ({"method": "norm", "keep": "2.5"}, "outside"),
        ({"method": "blank"}, "control of our own runner"),
        ({"method": "norm", "powr": 2}, "has no option"),
    ):
        with pytest.raises(ConfigError, match=words):
            VTPrune("pocket-llava", **settings)


def test_stop_words() -> None:
    assert lmms.stopper(["ASSISTANT:", "\n\n"])(" red\n\nASSISTANT: no") == "red"
    assert lmms.stopper([])(" red ") == "red"


def test_clips_are_read(tmp_path: Path) -> None:
    from PIL import Image

    from vtprune import video

    pytest.importorskip("av")
    shades = [Image.new("RGB", (64, 48), (40 * i, 40 * i, 40 * i)) for i in range(6)]
    video.write(tmp_path / "clip.mp4", shades, fps=2)
    parts = [{"type": "video", "url": str(tmp_path / "clip.mp4")}, {"type": "text", "text": "what ?"}]
    (message,) = lmms.messages_of([{"role": "user", "content": parts}])
    clip, text = message["content"]
    assert clip["type"] == "video" and clip["fps"] == pytest.approx(2) and text["text"] == "what ?"
    for frame, shade in zip(clip["video"], shades, strict=True):
        assert abs(frame.getpixel((5, 5))[0] - shade.getpixel((5, 5))[0]) < 8
    for part in ({"type": "video", "url": str(tmp_path / "none.mp4")}, {"type": "audio", "url": "a.wav"}):
        with pytest.raises(InputError):
            lmms.messages_of([{"role": "user", "content": [part]}])
