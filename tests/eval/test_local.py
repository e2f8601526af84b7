# SPDX-License-Identifier: Apache-2.0
"""Public formats in folders: read, sampled, scored; and what is said about folders that are not so."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtprune.errors import ConfigError, InputError
from vtprune.eval import metrics, runner
from vtprune.eval.tasks import Example, get


def picture(path: Path, color: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), color).save(path)


def encoded(color: str = "red") -> str:
    stream = io.BytesIO()
    Image.new("RGB", (32, 24), color).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def vqav2(folder: Path) -> None:
    questions = [{"question_id": 10 + i, "image_id": 7 + i, "question": f"how many {i} ?"} for i in range(3)]
    people = ["two"] * 4 + ["3"] * 6
    notes = [
        {
            "question_id": 10 + i,
            "multiple_choice_answer": "3",
            "answer_type": "number" if i else "other",
            "answers": [{"answer": text, "answer_id": n} for n, text in enumerate(people)],
        }
        for i in range(3)
    ]
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": notes}))
    for i in range(3):
        picture(folder / "val2014" / f"COCO_val2014_{7 + i:012d}.jpg")


def textvqa(folder: Path) -> None:
    row = {"question_id": 1, "image_id": "ab12", "question": "what is written?", "answers": ["stop"] * 10}
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [row]}))
    picture(folder / "train_images" / "ab12.jpg")


def pope(folder: Path) -> None:
    for kind in ("random", "popular"):
        rows = [
            {"question_id": i, "image": f"COCO_val2014_{i // 2:012d}.jpg", "text": "Is there a cat?", "label": label}
            for i, label in enumerate(["yes", "no"] * 3, 1)
        ]
        (folder / f"coco_pope_{kind}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(4):
        picture(folder / "images" / f"COCO_val2014_{i:012d}.jpg")


def scienceqa(folder: Path) -> None:
    common = {"question": "Which ?", "choices": ["a cat", "a dog"], "answer": 1, "hint": "Look.", "split": "test"}
    (folder / "problems.json").write_text(
        json.dumps(
            {"5": {**common, "image": "image.png", "subject": "natural science"}, "6": {**common, "image": None}}
        )
    )
    picture(folder / "test" / "5" / "image.png")


def mmbench(folder: Path) -> None:
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    rows = [
        ["1", "What color ?", "nan", "red", "blue", "nan", "nan", "A", "color", encoded()],
        ["2", "And now ?", "Look.", "cat", "dog", "bird", "fish", "D", "object", "1"],
    ]
    lines = ["\t".join(cells) for cells in (head, *rows)]
    (folder / "mmbench_dev_en.tsv").write_text("\n".join(lines) + "\n")


def mme(folder: Path) -> None:
    for kind in ("count", "code_reasoning"):
        for i in range(2):
            picture(folder / kind / f"{i}.png")
            text = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
            (folder / kind / f"{i}.txt").write_text(text)


MAKERS = {"vqav2": vqav2, "textvqa": textvqa, "pope": pope, "scienceqa": scienceqa, "mmbench": mmbench, "mme": mme}
Made = dict[str, Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    folders = {}
    for name, make in MAKERS.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        make(folders[name])
    return folders


def examples(name: str, folder: Path, count: int = 100, seed: int = 0) -> list[Example]:
    return list(get(f"{name}:{folder}").examples("test", count, seed))


def test_all_formats(made: Made) -> None:
    found = {name: examples(name, folder) for name, folder in made.items()}
    assert {name: len(rows) for name, rows in found.items()} == {
        "vqav2": 3, "textvqa": 1, "pope": 12, "scienceqa": 1, "mmbench": 2, "mme": 8
    }  # fmt: skip
    for name, rows in found.items():
        assert len({row.id for row in rows}) == len(rows)
        assert all(row.parts("image")[0]["image"].size == (32, 24) and not row.broken for row in rows), name
        assert {row.metric for row in rows} == {{"scienceqa": "letter", "vqav2": "vqa"}.get(name, name)}
    texts = {name: rows[0].parts("text")[0]["text"] for name, rows in found.items()}
    short = "\nAnswer the question using a single word or phrase."
    assert texts["vqav2"] == f"how many 0 ?{short}"
    assert texts["mme"] == f"Is it red?{short}"
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert texts["scienceqa"] == f"Context: Look.\nWhich ?\nA. a cat\nB. a dog{letter}"
    assert "A. red\nB. blue\n" in texts["mmbench"] and "C." not in texts["mmbench"]
    assert [row.answer for row in found["mmbench"]] == ["A", "D"]
    assert {row.kind for row in found["pope"]} == {"random", "popular"}
    score = metrics.score
    assert score("3", found["vqav2"][0]) == 1 and score("2", found["vqav2"][0]) == pytest.approx(1)
    assert score("B", found["scienceqa"][0]) == 1 and score("fish", found["mmbench"][1]) == 1


def test_samples_are_random_and_the_same_each_time(made: Made) -> None:
    some = [row.id for row in examples("pope", made["pope"], 5)]
    assert some == [row.id for row in examples("pope", made["pope"], 5)] == [
        row.id for row in examples("pope", made["pope"], 8)
    ][:5]  # fmt: skip
    assert some != [row.id for row in examples("pope", made["pope"], 5, seed=1)]
    pairs = examples("mme", made["mme"], 4)
    assert all(a.group == b.group and a.kind == b.kind for a, b in zip(pairs[::2], pairs[1::2], strict=True))


def test_unreadable_and_missing_pictures_are_broken_samples(made: Made) -> None:
    next((made["pope"] / "images").iterdir()).write_bytes(b"no picture")
    cut = made["textvqa"] / "train_images" / "ab12.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    (made["scienceqa"] / "test" / "5" / "image.png").unlink()
    table = made["mmbench"] / "mmbench_dev_en.tsv"
    table.write_text(table.read_text().replace(encoded(), "%%%"))
    for name, words in (
        ("pope", "cannot be read"),
        ("textvqa", "ab12.jpg cannot be read"),
        ("scienceqa", "5/image.png is not there"),
        ("mmbench", "not base64"),
    ):
        broken = [row for row in examples(name, made[name]) if row.broken]
        assert broken and words in broken[0].broken, name
        assert metrics.score(broken[0].answer, broken[0]) == 0


def rewrite(file: Path, change: Any) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_what_is_wrong_with_a_folder_is_said(made: Made, tmp_path: Path) -> None:
    def said(name: str, place: Path, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            get(f"{name}:{place}")

    said("pope", tmp_path / "none", "there is no folder")
    said("poppe", made["pope"], "did you mean 'pope'")
    said("vqav2", made["pope"], r"needs one file \*questions\*.json, there is none; the folder has coco_pope_popular")
    questions = made["vqav2"] / "v2_OpenEnded_mscoco_val2014_questions.json"
    rewrite(questions, lambda data: data["questions"][1].update(text=data["questions"][1].pop("question")))
    said("vqav2", made["vqav2"], "question 2: expected the columns question_id, image_id, question; found .*text")
    rewrite(made["textvqa"] / "TextVQA_0.5.1_val.json", lambda data: data.update(rows=data.pop("data")))
    said("textvqa", made["textvqa"], "has no 'data'; it has rows")
    (made["pope"] / "coco_pope_random.json").write_text("{}\n{")
    said("pope", made["pope"], "a JSON object on each line")
    (made["pope"] / "coco_pope_random.json").write_text(
        '{"question_id": 1, "image": "x", "text": "?", "label": "maybe"}'
    )
    said("pope", made["pope"], "'maybe', not yes or no")
    rewrite(made["scienceqa"] / "problems.json", lambda data: data["5"].update(answer=2))
    said("scienceqa", made["scienceqa"], "answer 2 of 2 choices")
    (made["mmbench"] / "mmbench_dev_en.tsv").write_text("index\tquestion\n1\twhat\n")
    said("mmbench", made["mmbench"], "expected the columns .* found index, question")
    (made["mme"] / "count" / "0.txt").write_text("one line")
    said("mme", made["mme"], "two lines of a question, a tab")


def test_doubled_ids_and_empty_answers_stop_a_run(made: Made) -> None:
    file = made["textvqa"] / "TextVQA_0.5.1_val.json"
    rewrite(file, lambda data: data["data"].append(data["data"][0]))
    task = get(f"textvqa:{made['textvqa']}")
    assert task.drafts is not None
    with pytest.raises(InputError, match="two questions with the id '1'"):
        list(runner.unique(task.drafts("test", 9, 0), task.name))
    rewrite(made["vqav2"] / "v2_mscoco_val2014_annotations.json", lambda d: d["annotations"][0].update(answers=[]))
    rewrite(
        made["vqav2"] / "v2_mscoco_val2014_annotations.json",
        lambda d: d["annotations"][0].update(multiple_choice_answer=""),
    )
    task = get(f"vqav2:{made['vqav2']}")
    assert task.drafts is not None
    with pytest.raises(InputError, match="question '10' has an empty answer"):
        list(runner.unique(task.drafts("test", 9, 0), task.name))
