# SPDX-License-Identifier: Apache-2.0
"""Public benchmarks from a folder, in the formats in which their authors give them, scored as they score them.

``vqav2:FOLDER``
    ``*questions*.json`` (``questions: image_id, question, question_id``) and ``*annotations*.json``
    (``annotations: question_id, answers``); so are VizWiz-like and OK-VQA sets packed that way.
``textvqa:FOLDER``
    ``*.json`` with ``data: question_id, image_id, question, answers``.
``pope:FOLDER``
    ``*pope*.json``, a JSON object a line: ``question_id, image, text, label``.
``scienceqa:FOLDER``
    ``problems.json``, by id: ``question, choices, answer, hint, image, split``; those with a picture are asked.
``mmbench:FILE``
    A TSV (or a folder with one): ``index, question, A, B, answer, category, image`` (base64), and ``hint, C, D``.
``mme:FOLDER``
    A folder for each category; beside each picture a ``.txt`` with two lines ``question<TAB>Yes``.

Prompts are those of lmms-eval's default. The folder is the split; with fewer questions than it has, a random sample
under the seed is asked. A picture that is missing or cannot be read is a broken sample: counted, told, and never right.
Any other fault of a file is an error before anything is asked.
"""

from __future__ import annotations

import base64
import binascii
import csv
import functools
import io
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..errors import ConfigError, InputError
from ..plain import parse_json
from ..registry import nearest
from .tasks import Example, Message, Task, drawn, user

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
#: MMBench keeps pictures in cells.
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


def _the_file(folder: Path, *patterns: str) -> Path:
    """The only file of that name in a folder."""
    found = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    if len(found) != 1:
        have = ", ".join(sorted(file.name for file in folder.iterdir())[:12]) or "nothing"
        why = "there is none" if not found else f"there are {len(found)}: {', '.join(f.name for f in found)}"
        raise ConfigError(f"{folder} needs one file {' or '.join(patterns)}, {why}; the folder has {have}")
    return found[0]


def _json(file: Path, *keys: str) -> Any:
    """A JSON file, and what lies under a key of it."""
    try:
        whole = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file} ({error}); it should be one JSON object") from None
    for key in keys:
        if not isinstance(whole, dict) or key not in whole:
            have = ", ".join(whole) if isinstance(whole, dict) else f"a {type(whole).__name__}"
            raise ConfigError(f"{file} has no {key!r}; it has {have}")
        whole = whole[key]
    return whole


#: Kinds of columns, as a message names them.
NAME: tuple[type, ...] = (str, int)
_KINDS: dict[Any, str] = {str: "text", int: "a whole number", list: "a list", NAME: "text or a whole number"}


def _check(rows: Sequence[dict[str, Any]], columns: dict[str, Any], file: Path) -> None:
    """Refuse a file without these columns (by name, and what they hold), or without rows."""
    if not rows:
        raise ConfigError(f"{file} has no questions")
    if not isinstance(rows, list):
        raise ConfigError(f"{file}: expected a list of questions, found a {type(rows).__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ConfigError(f"{file}, question {number + 1}: expected an object, found {str(row)[:40]!r}")
        missing = [column for column in columns if column not in row]
        if missing:
            raise ConfigError(
                f"{file}, question {number + 1}: expected the columns {', '.join(columns)}; found "
                f"{', '.join(map(str, row))} (missing: {', '.join(missing)})"
            )
        for column, kind in columns.items():
            _is(row[column], kind, f"{file}, question {number + 1}: {column}")


def _is(value: Any, kind: Any, what: str) -> None:
    """Refuse a value of another kind."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{what} is {str(value)[:40]!r} ({type(value).__name__}); expected {_KINDS[kind]}")


@functools.lru_cache(maxsize=64)
def _pictures(folder: Path) -> dict[str, Path]:
    """Pictures under a folder by name, with and without their ending."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in PICTURES]
    return {name: file for file in reversed(files) for name in (file.name, file.stem)}


def open_picture(file: Path | io.BytesIO, name: str) -> Image.Image:
    """A picture in RGB.

    Raises
    ------
    InputError
        It is not there, or cannot be read to its end.
    """
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"the picture {name} is not there") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the picture {name} cannot be read ({' '.join(str(error).split())})") from None


def _asked(text: str, find: Callable[[], Image.Image]) -> Callable[[], tuple[Message, ...]]:
    return lambda: (user({"type": "image", "image": find()}, {"type": "text", "text": text}),)


def _named(folder: Path, *names: str) -> Callable[[], Image.Image]:
    """The picture of one of these names, anywhere under a folder."""

    def find() -> Image.Image:
        known = _pictures(folder)
        file = next((known[name] for name in names if name in known), None)
        if file is None:
            raise InputError(f"the picture {names[0]} is not under {folder.name}")
        return open_picture(file, file.name)

    return find


def _vqav2(folder: Path) -> list[Example]:
    asked, answered = _the_file(folder, "*questions*.json"), _the_file(folder, "*annotations*.json")
    questions, annotations = _json(asked, "questions"), _json(answered, "annotations")
    _check(questions, {"question_id": NAME, "image_id": NAME, "question": str}, asked)
    _check(annotations, {"question_id": NAME, "answers": list}, answered)
    notes = {note["question_id"]: note for note in annotations}
    found = []
    for row in questions:
        if row["question_id"] not in notes:
            raise ConfigError(f"{answered} has no answers to question {row['question_id']} of {asked.name}")
        note = notes[row["question_id"]]
        answers: tuple[Any, ...] = tuple(a.get("answer") if isinstance(a, dict) else a for a in note["answers"])
        for answer in answers:
            _is(answer, str, f"{answered}, question {row['question_id']}: an answer")
        number = row["image_id"]
        names = [str(number)]
        if isinstance(number, int):
            names += [f"COCO_{part}_{number:012d}" for part in ("val2014", "train2014", "test2015")]
        shown = str(note.get("multiple_choice_answer") or "") or (answers[0] if answers else "")
        text = f"{row['question']}{SHORT}"
        kind = str(note.get("answer_type", "all"))
        draw = _asked(text, _named(folder, *names))
        found.append(Example("", str(row["question_id"]), kind, (), shown, answers, "vqa", draw=draw))
    return found


def _textvqa(folder: Path) -> list[Example]:
    file = _the_file(folder, "*.json")
    rows = _json(file, "data")
    _check(rows, {"question_id": NAME, "image_id": NAME, "question": str, "answers": list}, file)
    for row in rows:
        for answer in row["answers"]:
            _is(answer, str, f"{file}, question {row['question_id']}: an answer")
    return [
        Example(
            *("", str(row["question_id"]), "all", (), row["answers"][0] if row["answers"] else ""),
            *(tuple(row["answers"]), "textvqa"),
            draw=_asked(f"{row['question'].capitalize()}{SHORT}", _named(folder, str(row["image_id"]))),
        )
        for row in rows
    ]


def _pope(folder: Path) -> list[Example]:
    files = sorted(folder.glob("*pope*.json"))
    if not files:
        _the_file(folder, "*pope*.json")
    found = []
    for file in files:
        try:
            rows = [parse_json(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {file} ({error}); it should have a JSON object on each line") from None
        _check(rows, {"question_id": NAME, "image": str, "text": str, "label": str}, file)
        kind = file.stem.rsplit("_", 1)[-1]
        for row in rows:
            label = row["label"].strip().lower()
            if label not in ("yes", "no"):
                raise ConfigError(
                    f"{file}, question {row['question_id']}: the label is {row['label']!r}, not yes or no"
                )
            draw = _asked(f"{row['text'].strip()}{SHORT}", _named(folder, row["image"], Path(row["image"]).stem))
            found.append(Example("", f"{kind}/{row['question_id']}", kind, (), label, (), "pope", draw=draw))
    return found


def _scienceqa(folder: Path) -> list[Example]:
    file = _the_file(folder, "problems.json")
    problems = _json(file)
    if not isinstance(problems, dict) or not all(isinstance(row, dict) for row in problems.values()):
        raise ConfigError(f"{file} should be one JSON object of problems by id")
    rows = [{**row, "id": name} for name, row in problems.items()]
    _check(rows, {"question": str, "choices": list, "answer": int}, file)
    found = []
    for row in rows:
        if not row.get("image"):
            continue
        choices = "\n".join(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(row["choices"]))
        if not 0 <= row["answer"] < len(row["choices"]):
            raise ConfigError(f"{file}, problem {row['id']}: answer {row['answer']} of {len(row['choices'])} choices")
        hint = f"Context: {row['hint']}\n" if row.get("hint") else ""
        _is(row["image"], str, f"{file}, problem {row['id']}: image")
        places = [part / row["id"] / row["image"] for part in (folder / str(row.get("split", "test")), folder)]

        def find(places: list[Path] = places, name: str = f"{row['id']}/{row['image']}") -> Image.Image:
            return open_picture(next((place for place in places if place.is_file()), places[0]), name)

        text = f"{hint}{row['question']}\n{choices}{LETTER}"
        answer = chr(65 + row["answer"])
        kind = str(row.get("subject", "all"))
        own: dict[str, Any] = {"choices": tuple(map(str, row["choices"])), "draw": _asked(text, find)}
        found.append(Example("", row["id"], kind, (), answer, (), "letter", **own))
    if not found:
        raise ConfigError(f"{file} has no problem with a picture")
    return found


def _mmbench(place: Path) -> list[Example]:
    file = place if place.is_file() else _the_file(place, "*.tsv")
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t"))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"cannot read {file} ({error}); it should be a TSV") from None
    _check(rows, dict.fromkeys(("index", "question", "A", "B", "answer", "category", "image"), str), file)
    by_index = {row["index"]: row for row in rows}
    found = []
    for row in rows:
        options = {c: row[c] for c in "ABCDE" if row.get(c) not in (None, "", "nan")}
        listed = "There are several options:\n" + "\n".join(f"{c}. {text}" for c, text in options.items()) + "\n"
        hint = f"{row['hint']} " if row.get("hint") not in (None, "", "nan") else ""

        def find(row: dict[str, str] = row) -> Image.Image:
            image = row["image"]
            if image in by_index and len(image) < 16:  # a picture that stands in another row
                image = by_index[image]["image"]
            try:
                return open_picture(io.BytesIO(base64.b64decode(image, validate=True)), f"of question {row['index']}")
            except (binascii.Error, ValueError) as error:  # the latter where it is not even ASCII
                raise InputError(f"the picture of question {row['index']} is not base64 ({error})") from None

        text = f"{hint}{row['question']} {listed}{LETTER}"
        own: dict[str, Any] = {"choices": tuple(options.values()), "draw": _asked(text, find)}
        found.append(Example("", row["index"], row["category"], (), row["answer"], (), "mmbench", **own))
    return found


def _mme(folder: Path) -> list[Example]:
    found = []
    for category in sorted(part for part in folder.iterdir() if part.is_dir()):
        for file in sorted(category.rglob("*.txt")):
            try:
                lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            except (OSError, ValueError) as error:
                raise ConfigError(f"cannot read {file} ({error}); it should be text") from None
            if len(lines) != 2 or any(len(line) != 2 for line in lines):
                raise ConfigError(f"{file} should have two lines of a question, a tab, and Yes or No; it has {lines}")
            for number, (question, answer) in enumerate(lines):
                if answer.strip().lower().rstrip(".") not in ("yes", "no"):
                    raise ConfigError(f"{file}, line {number + 1}: the answer is {answer!r}, not Yes or No")
                text = question.strip().replace(" Please answer yes or no.", "") + SHORT
                draw = _asked(text, _named(category, file.stem))
                own: dict[str, Any] = {"group": file.stem, "draw": draw}
                name = f"{category.name}/{file.stem}/{number}"
                found.append(Example("", name, category.name, (), answer.strip(), (), "mme", **own))
    if not found:
        raise ConfigError(f"{folder} has no category/*.txt; MME has a folder for each of its categories")
    return found


READERS = {
    "vqav2": _vqav2,
    "textvqa": _textvqa,
    "pope": _pope,
    "scienceqa": _scienceqa,
    "mmbench": _mmbench,
    "mme": _mme,
}


def open_task(name: str) -> Task:
    """The task called ``format:folder``.

    Raises
    ------
    ConfigError
        An unknown format, a folder that is not there, or a file that is not as its format says.
    """
    kind, _, path = name.partition(":")
    if kind not in READERS:
        raise ConfigError(
            f"unknown format {kind!r}{nearest(kind, [*READERS])} in {name!r}; known: {', '.join(READERS)}"
        )
    place = Path(path).expanduser()
    if not place.is_dir() and not (kind == "mmbench" and place.is_file()):
        raise ConfigError(f"{name}: there is no folder {path!r}; give the one that holds the files of {kind}")
    examples = [Example(**{**vars(e), "task": name}) for e in READERS[kind](place)]

    def drafts(split: str, count: int, seed: int) -> Iterator[Example]:
        groups: dict[str, list[Example]] = {}
        for example in examples:
            groups.setdefault(f"{example.kind}/{example.group}" if example.group else example.id, []).append(example)
        order = list(groups.values())
        if len({e.id for e in examples}) < len(examples):
            order = [[example] for example in examples]  # `runner.unique` says which id is there twice
        if count < len(examples):
            random.Random(f"{kind}/{seed}").shuffle(order)
        yield from [example for group in order for example in group][:count]

    return Task(name, drawn(drafts), max_new_tokens=16, drafts=drafts)
