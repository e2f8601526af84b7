# SPDX-License-Identifier: Apache-2.0
"""The runner on pocket-llava: rows, determinism, resuming, and that one wrong answer shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vtprune
from vtprune.errors import ConfigError
from vtprune.eval import runner, table
from vtprune.eval.tasks import Example, Task, get

METHODS = ["dense", "norm", "idpruner importance=norm", "blank", "question-only", "downsample"]
KEEPS = ["1/9"]
SETTINGS: dict[str, Any] = {"count": 6, "batch": 3}
Pocket = tuple[Any, Any]


@pytest.fixture(scope="module")
def pocket() -> Pocket:
    return vtprune.load("pocket-llava", device="cpu")


@pytest.fixture(scope="module")
def whole(pocket: Pocket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished file; not to be written."""
    out = tmp_path_factory.mktemp("eval") / "whole.jsonl"
    runner.run(*pocket, ["pocketvqa/basic"], METHODS, KEEPS, out, **SETTINGS)
    return out


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many questions each call of generate() answered."""
    seen: list[int] = []
    original = runner.generate

    def counting(model: Any, processor: Any, inputs: Any, most: int) -> list[str]:
        seen.append(len(inputs["input_ids"]))
        return original(model, processor, inputs, most)

    monkeypatch.setattr(runner, "generate", counting)
    return seen


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["method"], row["keep"], row["id"]


def test_rows(whole: Path) -> None:
    (header,), rows = table.read(whole)
    assert header["batch"] == 3 and header["device"] == "cpu" and header["dtype"] == "float32"
    assert len(header["weights_sha256"]) == 64
    assert header["tasks"] == [{"task": "pocketvqa/basic", "split": "val", "count": 6, "seed": 0}]
    assert len(rows) == len({key(row) for row in rows}) == 6 * len(METHODS)
    tokens = {row["method"]: (row["keep"], row["tokens_in"], row["tokens_out"]) for row in rows}
    assert tokens == {
        "dense": ("1", 576, 576),
        "norm": ("1/9", 576, 64),
        "idpruner importance=norm": ("1/9", 576, 64),
        "blank": ("1", 576, 576),
        "question-only": ("0", 576, 0),
        "downsample": ("1/9", 576, 64),
    }
    assert all(row["correct"] == (row["prediction"] == row["answer"]) for row in rows)
    assert {tuple(row["options"].items()) for row in rows} == {(), (("importance", "norm"),)}


def test_the_model_sees(whole: Path) -> None:
    """Dense is right, and a blank picture, or none, is at most a guess."""
    right = {method: 0 for method in METHODS}
    for row in table.read(whole)[1]:
        right[row["method"]] += row["correct"]
    assert right["dense"] >= 5
    assert max(right["blank"], right["question-only"]) <= 3
    assert right["norm"] < right["dense"]


def test_the_same_as_without_the_runner(pocket: Pocket, whole: Path) -> None:
    model, processor = pocket
    examples = list(get("pocketvqa/basic").examples("val", 3, 0))
    texts = [processor.apply_chat_template([*e.messages], add_generation_prompt=True) for e in examples]
    pictures = [e.parts("image")[0]["image"] for e in examples]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    rows = {key(row): row["prediction"] for row in table.read(whole)[1]}
    for method in ("norm", "dense"):
        with vtprune.using(model, None if method == "dense" else method, keep=1 / 9):
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        given = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        keep = "1" if method == "dense" else "1/9"
        assert [rows[method, keep, e.id] for e in examples] == [text.strip() for text in given]


def test_again_is_the_same_to_the_byte(pocket: Pocket, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.jsonl"
    runner.run(*pocket, ["pocketvqa/basic"], METHODS, KEEPS, out, **SETTINGS)
    assert out.read_bytes() == whole.read_bytes()


def test_nothing_is_run_twice(pocket: Pocket, whole: Path, tmp_path: Path, generated: list[int]) -> None:
    out = tmp_path / "copy.jsonl"
    out.write_bytes(whole.read_bytes())
    rows = runner.run(*pocket, ["pocketvqa/basic"], METHODS, KEEPS, out, **SETTINGS)
    assert generated == []
    assert out.read_bytes() == whole.read_bytes()
    assert len(rows) == 6 * len(METHODS)


def test_an_interrupted_run_goes_on(pocket: Pocket, whole: Path, tmp_path: Path, generated: list[int]) -> None:
    out = tmp_path / "cut.jsonl"
    lines = whole.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:-8]) + lines[-8][:20])  # killed in the middle of a line
    assert len(table.read(out)[1]) == len(lines) - 9
    rows = runner.run(*pocket, ["pocketvqa/basic"], METHODS, KEEPS, out, **SETTINGS)
    assert generated == [3, 3, 3]  # the last two whole, and the batch of the third that lacks rows
    assert sorted(map(key, rows)) == sorted(map(key, table.read(whole)[1]))
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())


def test_another_method_is_added(pocket: Pocket, whole: Path, tmp_path: Path, generated: list[int]) -> None:
    out = tmp_path / "more.jsonl"
    out.write_bytes(whole.read_bytes())
    runner.run(*pocket, ["pocketvqa/basic"], ["dense", "grid"], ["1/9"], out, **SETTINGS)
    assert len(generated) == 2
    headers, rows = table.read(out)
    assert [header["methods"] for header in headers] == [METHODS, ["dense", "grid"]]
    assert len(table.summarise(rows, draws=100)) == len(METHODS) + 1


def test_one_wrong_answer_shows(pocket: Pocket, whole: Path, tmp_path: Path) -> None:
    def spoiled(split: str, count: int, seed: int) -> Iterator[Example]:
        for number, example in enumerate(get("pocketvqa/basic").examples(split, count, seed)):
            yield replace(example, answer="nothing") if number == 1 else example

    before = {row["method"]: row for row in table.summarise(table.read(whole)[1], draws=100)}
    out = tmp_path / "spoiled.jsonl"
    rows = runner.run(*pocket, [Task("pocketvqa/basic", spoiled)], ["dense"], [], out, **SETTINGS)
    (after,) = table.summarise(rows, draws=100)
    assert before["dense"]["color"] == 1.0
    assert after["color"] == 0.0
    assert after["mean"] == pytest.approx(before["dense"]["mean"] - 1 / 6)


def test_another_model_is_refused(pocket: Pocket, whole: Path, tmp_path: Path) -> None:
    model, processor = pocket
    out = tmp_path / "copy.jsonl"
    out.write_bytes(whole.read_bytes())
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        old = weight[0, 0].item()
        weight[0, 0] += 1
    try:
        with pytest.raises(ConfigError, match=r"weights_sha256.*choose another file"):
            runner.run(model, processor, ["pocketvqa/basic"], METHODS, KEEPS, out, **SETTINGS)
    finally:
        with torch.no_grad():
            weight[0, 0] = old
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("methods", "keeps", "words"),
    [
        (["nrom"], ["1/4"], "did you mean 'norm'"),
        (["norm"], ["1"], "fraction or a count"),
        (["norm power"], ["1/4"], "key=value"),
        (["norm power=2"], ["1/4"], "has no option"),
        (["dense keep=1"], ["1/4"], "control without options"),
        (["norm keep=0.5"], ["1/4"], "not an option of a method"),
        (["downsample"], ["2.5"], "outside"),
        ([""], ["1/4"], "is not a control"),
        (["norm", " norm"], ["1/4"], "twice"),
        (["norm+nrid"], ["1/4"], "did you mean 'grid'"),
        (["norm+grid"], ["64t+1/2"], "a count belongs to the last method"),
        (["norm"], ["1/2+64t"], "keep="),
        (["norm+idpruner power=2"], ["1/4"], "none of the methods norm, idpruner has an option 'power'"),
    ],
)
def test_mistakes(methods: list[str], keeps: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        runner.combinations(methods, keeps)


def test_files_of_others_and_other_splits_are_left_alone(pocket: Pocket, whole: Path, tmp_path: Path) -> None:
    model, processor = pocket
    notes, copy = tmp_path / "notes.txt", tmp_path / "copy.jsonl"
    notes.write_text("precious notes")
    copy.write_bytes(whole.read_bytes())
    settings = {**SETTINGS, "split": "train"}
    for out, given, words in (
        (notes, SETTINGS, "not a file of results"),
        (tmp_path, SETTINGS, "is a folder"),
        (copy, settings, "written with split="),
        (tmp_path / "new.jsonl", {**SETTINGS, "split": "dev"}, "has no split 'dev'; choose one of train, val, test"),
    ):
        with pytest.raises(ConfigError, match=words):
            runner.run(model, processor, ["pocketvqa/basic"], ["dense"], [], out, **given)
    assert notes.read_text() == "precious notes" and copy.read_bytes() == whole.read_bytes()


def test_labels() -> None:
    method = runner.Method.parse("  idpruner   importance=norm scope=joint ")
    assert method.label == "idpruner importance=norm scope=joint"
    config = method.config("1/4")
    assert (config.keep, config.scope, config.options) == (0.25, "joint", {"importance": "norm"})
    assert [keep for _, keep in runner.combinations(["dense", "norm"], ["1/4", "64t"])] == ["1", "1/4", "64t"]


def test_methods_in_a_row(pocket: Pocket, tmp_path: Path) -> None:
    label, keeps = "norm+idpruner importance=norm", ["1/9", "1/2+64t"]
    config = runner.Method.parse(label).config("1/2+64t")
    assert (config.method, config.keep, config.options) == (("norm", "idpruner"), (0.5, 64), {"importance": "norm"})
    out, settings = tmp_path / "x.jsonl", {"count": 3, "batch": 3}
    rows = runner.run(*pocket, ["pocketvqa/basic"], [label], keeps, out, **settings)
    assert sorted((row["method"], row["keep"], row["tokens_out"]) for row in rows) == [
        (label, keep, 64) for keep in sorted(keeps) for _ in range(3)
    ]
    model, processor = pocket
    examples = list(get("pocketvqa/basic").examples("val", 3, 0))
    texts = [processor.apply_chat_template([*e.messages], add_generation_prompt=True) for e in examples]
    pictures = [e.parts("image")[0]["image"] for e in examples]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    with vtprune.using(model, ["norm", "idpruner"], keep=(0.5, 64), importance="norm"):
        given = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    said = {row["id"]: row["prediction"] for row in rows if row["keep"] == "1/2+64t"}
    assert [said[e.id] for e in examples] == [
        text.strip() for text in processor.batch_decode(given, skip_special_tokens=True)
    ]


def test_places(pocket: Pocket, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        runner.run(*pocket, ["pocketvqa/basic"], ["dense"], [], tmp_path / "no" / "x.jsonl", **SETTINGS)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(["a list"]) + "\n")
    with pytest.raises(ConfigError, match="not a file of results"):
        runner.run(*pocket, ["pocketvqa/basic"], ["dense"], [], other, **SETTINGS)


def test_evaluate(tmp_path: Path) -> None:
    said: list[str] = []
    rows = runner.evaluate(
        *("pocket-llava", ["pocketvqa/basic"], ["dense"], ["1/4"], tmp_path / "x.jsonl"),
        **{"count": 2, "device": "cpu", "commit": "abc", "say": said.append},
    )
    assert [(row["task"], row["method"], row["questions"]) for row in rows] == [("pocketvqa/basic", "dense", 2)]
    assert table.read(tmp_path / "x.jsonl")[0][0]["commit"] == "abc"
    assert said == ["pocketvqa/basic: 2 of 2"]
