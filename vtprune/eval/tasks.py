# SPDX-License-Identifier: Apache-2.0
"""What can be asked: a `Task` yields `Example` objects, chats with pictures and clips in them and one right answer."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import ConfigError, InputError
from ..registry import nearest

if TYPE_CHECKING:
    from ..models.pocket.worlds import Dialogue

Message = dict[str, Any]

_TASKS: dict[str, Task] = {}


@dataclass(frozen=True)
class Example:
    """One question with its only right answer.

    Parameters
    ----------
    task
        Name of the task.
    id
        Unique within the task, the same on every machine. Split and seed are part of it.
    kind
        Accuracy is given per kind, and the mean is taken over kinds.
    messages
        A chat as transformers writes it: ``{"role": ..., "content": [part, ...]}``. A part is
        ``{"type": "text", "text": str}``, ``{"type": "image", "image": PIL.Image}``, or
        ``{"type": "video", "video": [PIL.Image, ...], "fps": float}``. Demonstrations are earlier turns.
    answer
        What the decoded and stripped output must equal; of other metrics, the answer to show.
    answers
        All accepted answers, those of ten people for example; default `answer` alone.
    metric
        How an answer is scored; a name in `metrics.METRICS`.
    group
        Questions that are scored together, such as the two that MME asks about a picture.
    choices
        Texts of the options A, B, C, ... of a multiple-choice question.
    broken
        Why the question cannot be asked, such as a picture that cannot be read. It is counted, and never right.
    then
        A second question, asked when the model has answered the messages. It is the one that is scored, and the picture
        was pruned without a word of it.
    draw
        Makes the messages; see `ready`. A question that is passed over costs nothing then.
    scorer
        Scores an answer in place of the metric, whose name is a label then.
    """

    task: str
    id: str
    kind: str
    messages: tuple[Message, ...]
    answer: str
    answers: tuple[str, ...] = ()
    metric: str = "exact"
    group: str = ""
    choices: tuple[str, ...] = ()
    broken: str = ""
    then: str = ""
    draw: Callable[[], tuple[Message, ...]] | None = field(default=None, compare=False)
    scorer: Callable[[str], float] | None = field(default=None, compare=False)

    def ready(self) -> Example:
        """The example with its pictures drawn or read; `broken` says so where that cannot be done."""
        if self.draw is None:
            return self
        try:
            return replace(self, messages=self.draw(), draw=None)
        except InputError as error:
            return replace(self, broken=str(error), draw=None)

    def parts(self, kind: str) -> list[dict[str, Any]]:
        """Parts of one type (``"text"``, ``"image"``, ``"video"``) in order."""
        return [part for message in self.messages for part in message["content"] if part["type"] == kind]

    def map_pictures(self, change: Callable[[Image.Image], Image.Image]) -> Example:
        """The same example with every picture, and every frame of a clip, changed."""

        def changed(part: dict[str, Any]) -> dict[str, Any]:
            if part["type"] == "image":
                return {**part, "image": change(part["image"])}
            if part["type"] == "video":
                return {**part, "video": [change(frame) for frame in part["video"]]}
            return part

        return self._with_contents(lambda content: [changed(part) for part in content])

    def without_pictures(self) -> Example:
        """The same example with its text alone."""
        return self._with_contents(lambda content: [part for part in content if part["type"] == "text"])

    def _with_contents(self, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Example:
        messages = tuple({**message, "content": change(message["content"])} for message in self.messages)
        return replace(self, messages=messages)


@dataclass(frozen=True)
class Task:
    """A source of examples.

    Parameters
    ----------
    name
        Such as ``"pocketvqa/basic"``.
    examples
        ``examples(split, count, seed)`` yields the first `count` examples of a split, the same each time; a larger
        count begins with the same examples.
    max_new_tokens
        Longest answer, its end included.
    splits
        What `split` may be.
    drafts
        The same as `examples`, but of examples that draw their pictures when they are asked to (`Example.ready`).
    kinds
        Names of the kinds where they take turns, so that count = n * len(kinds) means n of each.
    """

    name: str
    examples: Callable[[str, int, int], Iterator[Example]]
    max_new_tokens: int = 8
    splits: tuple[str, ...] = ("train", "val", "test")
    drafts: Callable[[str, int, int], Iterator[Example]] | None = None
    kinds: tuple[str, ...] = ()


def register(task: Task) -> Task:
    """Make a task known under its name.

    Raises
    ------
    ConfigError
        Another task has that name.
    """
    if _TASKS.get(task.name, task) != task:
        raise ConfigError(f"a task named {task.name!r} exists already; choose another name")
    _TASKS[task.name] = task
    return task


def names() -> list[str]:
    """Names of all known tasks, sorted."""
    return sorted(_TASKS)


def get(name: str) -> Task:
    """The task of that name; ``format:folder`` is opened (see `local`), and ``lmms:name`` asked of lmms-eval.

    Raises
    ------
    ConfigError
        There is none, or its files are not as they should be.
    """
    if name not in _TASKS and ":" in name:
        return _open(name)
    if name not in _TASKS:
        raise ConfigError(f"unknown task {name!r}{nearest(name, names())}; known tasks: {', '.join(names())}")
    return _TASKS[name]


@functools.lru_cache(maxsize=32)
def _open(name: str) -> Task:
    from . import lmms, local

    return lmms.open_task(name) if name.startswith(lmms.PREFIX) else local.open_task(name)


def user(*parts: dict[str, Any]) -> Message:
    """What the user says."""
    return {"role": "user", "content": list(parts)}


def assistant(text: str) -> Message:
    """What the model is shown to have answered before."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _pocket_example(task: str, dialogue: Dialogue) -> Example:
    def draw() -> tuple[Message, ...]:
        from ..models.pocket.data import render
        from ..models.pocket.qwen import FPS

        messages = []
        for turn in dialogue.turns:
            pictures = [render(scene) for scene in turn.pictures]
            shown: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
            if turn.clip:
                shown = [{"type": "video", "video": pictures, "fps": FPS}]
            messages += [user(*shown, {"type": "text", "text": turn.question.text}), assistant(turn.question.answer)]
        return tuple(messages[:-1])

    return Example(task, dialogue.key, dialogue.kind, (), dialogue.answer, draw=draw)


def drawn(drafts: Callable[[str, int, int], Iterator[Example]]) -> Callable[[str, int, int], Iterator[Example]]:
    """The same examples with their pictures drawn."""

    def examples(split: str, count: int, seed: int) -> Iterator[Example]:
        for example in drafts(split, count, seed):
            yield example.ready()

    return examples


def _pocketvqa(world: str, kinds: tuple[str, ...]) -> Task:
    name = f"pocketvqa/{world}"

    def drafts(split: str, count: int, seed: int) -> Iterator[Example]:
        from ..models.pocket.worlds import exam

        try:
            for dialogue in exam(world, split, count, seed):
                yield _pocket_example(name, dialogue)
        except ValueError as error:  # an unknown split
            raise ConfigError(f"{name}: {error}") from None

    return Task(name, drawn(drafts), drafts=drafts, kinds=kinds)


def _easyvqa(split: str, count: int, seed: int) -> Iterator[Example]:
    """A random sample of the questions, on enlarged pictures; several may be about one picture."""
    from ..models.pocket.data import SIDE
    from ..models.pocket.easyvqa import load

    data = load(split)
    order = list(range(len(data.questions)))
    random.Random(f"easy-vqa/{split}/{seed}").shuffle(order)
    for index in order[:count]:
        number, text, answer = data.questions[index]
        kind = "yes or no" if answer in ("yes", "no") else "color" if "color" in text else "shape"
        # 64 pixels are four patches to a processor that keeps sizes; the pocket models learnt them at this one.
        picture = Image.fromarray(data.pictures[number]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        shown = {"type": "image", "image": picture}
        message = user(shown, {"type": "text", "text": text})
        yield Example("easy-vqa", f"easy-vqa/{split}/{index}", kind, (message,), answer)


#: Kinds of question in each world of PocketVQA (`worlds.WORLDS`, which takes a second to import).
POCKETVQA = {
    "basic": ("exist", "color", "shape", "count", "where", "ocr"),
    "extended": ("relation", "name", "conjunction"),
    "clutter": ("clutter-exist", "clutter-color", "clutter-shape", "clutter-count", "clutter-where", "clutter-ocr"),
    "hires": ("hires-ocr", "hires-shape", "hires-where"),
    "pair": ("pair-color", "pair-shape", "pair-count", "pair-ocr"),
    "icl": ("icl",),
    "video": ("motion", "order", "tally", "flash"),
}
for _world, _kinds in POCKETVQA.items():
    register(_pocketvqa(_world, _kinds))


def _basic_turns(split: str, count: int, seed: int) -> Iterator[Example]:
    """The questions of ``pocketvqa/basic``, each after one of another kind about the same picture."""
    from ..models.pocket.data import questions
    from ..models.pocket.worlds import exam

    for dialogue in exam("basic", split, count, seed):
        (turn,) = dialogue.turns
        first = next(asked for asked in questions(turn.pictures[0]) if asked.kind != dialogue.kind)
        name = "turns/pocketvqa/basic"
        asked = _pocket_example(name, replace(dialogue, turns=(replace(turn, question=first),)))
        yield replace(asked, kind=dialogue.kind, answer=dialogue.answer, then=turn.question.text)


def _easyvqa_turns(split: str, count: int, seed: int) -> Iterator[Example]:
    """The questions of ``easy-vqa``, each after another one about the same picture."""
    from ..models.pocket.easyvqa import load

    about: dict[int, list[str]] = {}
    for number, text, _ in load(split).questions:
        about.setdefault(number, []).append(text)
    pictures = {f"easy-vqa/{split}/{index}": number for index, (number, _, _) in enumerate(load(split).questions)}
    for example in _easyvqa(split, count, seed):
        (text,) = (part["text"] for part in example.parts("text"))
        first = next((other for other in about[pictures[example.id]] if other != text), text)
        message = user(example.parts("image")[0], {"type": "text", "text": first})
        yield replace(example, task="turns/easy-vqa", messages=(message,), then=text)


register(Task("turns/pocketvqa/basic", drawn(_basic_turns), drafts=_basic_turns, kinds=POCKETVQA["basic"]))
register(Task("turns/easy-vqa", _easyvqa_turns, splits=("train", "test"), kinds=("yes or no", "color", "shape")))
register(Task("easy-vqa", _easyvqa, splits=("train", "test"), kinds=("yes or no", "color", "shape")))
