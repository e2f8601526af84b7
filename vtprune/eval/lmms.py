# SPDX-License-Identifier: Apache-2.0
"""lmms-eval, both ways: its tasks on our board, and our tasks in its format. It stays as its authors ship it.

``vtprune eval --task lmms:NAME`` takes the prompts, the filters and the scoring of lmms-eval's task NAME, and asks them
by our own runner: pictures are encoded once for all methods, and a killed run goes on. ``lmms:NAME@FOLDER`` looks in
a folder with task definitions of your own. The other way round, ``lmms_eval --model vtprune`` runs its own loop over
a pruned model; that plug-in is `lmms_model`.

>>> from vtprune.eval.lmms import export
>>> export("pocketvqa/basic", "folder", count=50)  # doctest: +SKIP
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ImageFile

from .. import video
from ..errors import ConfigError, InputError
from .tasks import Example, Message, Task, drawn, get

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

PREFIX = "lmms:"
#: Of tasks that do not say how long an answer may be; lmms-eval's own models take 1024.
MAX_NEW_TOKENS = 1024
#: Frames of a clip, at most, and how many of each second; lmms-eval leaves both to the model.
FRAMES, FPS = 32, 2.0


def manifest() -> ModelManifest:
    """What lmms-eval's registry asks of the entry point ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vtprune", chat_class_path="vtprune.eval.lmms_model.VTPrune")


def messages_of(chat: Sequence[dict[str, Any]]) -> tuple[Message, ...]:
    """A chat of lmms-eval (``{"type": "image", "url": picture}``, ``{"type": "video", "url": path}``) as transformers
    writes it; of a clip at most `FRAMES` frames, `FPS` a second.

    Raises
    ------
    ConfigError
        It has clips, and nothing that reads them is installed.
    InputError
        A clip cannot be read, or the chat has sounds.
    """
    messages = []
    for message in chat:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                content.append({"type": "image", "image": part["url"].convert("RGB")})
            elif part["type"] == "video" and isinstance(part["url"], str | os.PathLike):
                clip = video.read(Path(part["url"]), fps=FPS, frames=FRAMES)
                content.append({"type": "video", "video": list(clip.frames), "fps": clip.fps})
            else:
                raise InputError(f"lmms-eval tasks with {part['type']} are not read; choose one with pictures or clips")
        messages.append({"role": message["role"], "content": content})
    return tuple(messages)


def _library(name: str) -> Any:
    strict = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        import lmms_eval.tasks
    except ImportError as error:
        raise ConfigError(
            f"{name} needs lmms-eval, which cannot be imported ({error}); pip install lmms-eval, or see "
            "docs/evaluation.md for a small installation"
        ) from None
    finally:  # its import makes Pillow read pictures that are cut off, in grey; here they count as broken
        ImageFile.LOAD_TRUNCATED_IMAGES = strict
    return lmms_eval.tasks


@dataclass(frozen=True)
class Scorer:
    """Scores one document's answer as its task does: its filters, then its metric's number for a single question."""

    task: Any
    doc_id: int
    metrics: tuple[str, ...]

    def __call__(self, given: str) -> float:
        from lmms_eval.api.instance import Instance

        doc = self.task.eval_docs[self.doc_id]
        name = self.task.config.task
        about = {"task": name, "doc_id": self.doc_id, "repeats": 1}
        instance = Instance("generate_until", ("", None, {}, self.doc_id, name, ""), 0, about)
        instance.doc, instance.resps = doc, [given]
        results = [given]
        for ensemble in self.task._filters[:1]:
            ensemble.apply([instance], [doc])
            results = [instance.filtered_resps[ensemble.name]]
        scores = self.task.process_results(doc, results)
        # MME answers to one of two names, by the category of the question.
        metric = next((name for name in self.metrics if name in scores), self.metrics[0])
        value = scores.get(metric)
        if isinstance(value, dict):
            value = value.get("score")
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise ConfigError(
                f"lmms:{name} gives {value!r} for one answer under {metric!r}; only metrics with a "
                "number in [0, 1] for each question can stand on a board. `lmms_eval --model vtprune` runs any"
            )
        return float(value)


def _metrics(task: Any) -> tuple[str, ...]:
    """Metrics that may give a number for each question (others collect answers for a judge or a server)."""
    named = [str(metric["metric"]) for metric in task.config.metric_list or []]
    usable = [name for name in named if name not in ("submission", "bypass") and "gpt" not in name]
    if not usable:
        raise ConfigError(
            f"lmms:{task.config.task} has no metric of its own ({', '.join(named) or 'none'}); choose another"
        )
    return tuple(usable)


def open_task(name: str) -> Task:
    """The task called ``lmms:NAME`` or ``lmms:NAME@FOLDER``.

    Raises
    ------
    ConfigError
        lmms-eval is not installed, does not know the task, cannot get its data, or the task is of no kind that we run.
    """
    library = _library(name)
    wanted, _, folder = name.removeprefix(PREFIX).partition("@")
    if folder and not Path(folder).is_dir():
        raise ConfigError(f"{name}: there is no folder {folder!r} with task definitions")
    # Reading all of its own definitions takes a while.
    manager = library.TaskManager("ERROR", folder or None, include_defaults=not folder, model_name="vtprune")
    if wanted not in manager.all_tasks:
        from ..registry import nearest

        raise ConfigError(f"lmms-eval has no task {wanted!r}{nearest(wanted, manager.all_tasks)}")
    try:
        found = library.get_task_dict([wanted], manager, task_type="chat")
    except Exception as error:  # of datasets, the hub, yaml, the task's own code
        raise ConfigError(f"{name}: lmms-eval cannot load it ({type(error).__name__}: {error})") from error
    task = found.get(wanted)
    if task is None or not hasattr(task, "config"):
        raise ConfigError(f"{name} is a group ({', '.join(map(str, found))}); name its tasks one by one")
    if task.config.output_type != "generate_until":
        raise ConfigError(f"{name} is a {task.config.output_type} task; only generate_until can be asked here")
    options = dict(task.config.generation_kwargs or {})
    named = _metrics(task)
    docs = task.eval_docs_no_media

    def drafts(split: str, count: int, seed: int) -> Iterator[Example]:
        for number in range(min(count, len(docs))):
            yield _example(name, task, docs[number], number, named, options)

    return Task(name, drawn(drafts), int(options.get("max_new_tokens", MAX_NEW_TOKENS)), drafts=drafts)


def _example(name: str, task: Any, doc: Any, number: int, named: tuple[str, ...], options: dict[str, Any]) -> Example:
    def draw() -> tuple[Message, ...]:
        try:
            return messages_of(task.doc_to_messages(task.eval_docs[number]))
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"question {number} cannot be read ({error})") from None

    target = task.doc_to_target(doc)
    answers = [str(one) for one in target] if isinstance(target, list) else [str(target)]
    until = options.get("until", [])
    scorer = Scorer(task, number, named)
    cut = stopper([until] if isinstance(until, str) else until)
    return Example(
        name, str(number), "all", (), answers[0], tuple(answers), name, draw=draw, scorer=lambda text: scorer(cut(text))
    )  # fmt: skip


def stopper(until: Sequence[str]) -> Callable[[str], str]:
    """Cuts a text where a stop word begins."""
    stops = [stop for stop in until if stop]

    def cut(text: str) -> str:
        for stop in stops:
            text = text.split(stop)[0]
        return text.strip()

    return cut


# -- our tasks in its format -------------------------------------------------------------------------------------------

_UTILS = '''# SPDX-License-Identifier: Apache-2.0
"""How lmms-eval asks and scores what vtprune exported. Chats come as they were, pictures where they stood."""

import json


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    pictures = iter(doc["images"])
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": part} if part is not None
                else {"type": "image", "url": next(pictures).convert("RGB")}
                for part in message["content"]
            ],
        }
        for message in json.loads(doc["chat"])
    ]


def doc_to_visual(doc):
    return [picture.convert("RGB") for picture in doc["images"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return "\\n".join(part for message in json.loads(doc["chat"]) for part in message["content"] if part is not None)


def process_results(doc, results):
    return {"exact": float(results[0].strip() in doc["answers"])}
'''

_YAML = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_messages: !function utils.doc_to_messages
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: "answer"
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {most}
  do_sample: false
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""


def export(
    task: str | Task,
    folder: str | Path,
    *,
    split: str = "test",
    count: int = 300,
    seed: int = 0,
    name: str | None = None,
) -> str:
    """Write a task as a definition and a dataset that lmms-eval reads, and return its name there.

    Parameters
    ----------
    task
        One of ours, with pictures (no clips) and answers that are right to the letter.
    folder
        Where to; made if it is not there. ``lmms_eval --include_path FOLDER --tasks NAME`` runs it.
    split, count, seed
        Which questions.
    name
        Name of the task there; default ours with underscores.

    Raises
    ------
    ConfigError
        The package ``datasets`` is missing.
    InputError
        The task has clips, a broken sample, or another metric.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError("exporting needs the package datasets; pip install 'vtprune[eval]'") from None
    import json

    task = get(task) if isinstance(task, str) else task
    name = name or re.sub(r"\W+", "_", task.name)
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for example in task.examples(split, count, seed):
        if example.broken or example.metric != "exact" or example.parts("video"):
            raise InputError(f"{task.name}: {example.id} cannot be exported; it needs pictures and an exact answer")
        chat = [
            {"role": m["role"], "content": [p["text"] if p["type"] == "text" else None for p in m["content"]]}
            for m in example.messages
        ]
        images = []
        for part in example.parts("image"):
            stream = io.BytesIO()
            part["image"].save(stream, "PNG")  # to the bit
            images.append({"bytes": stream.getvalue(), "path": None})
        answers = list(example.answers or (example.answer,))
        row = {"id": example.id, "kind": example.kind, "chat": json.dumps(chat), "images": images}
        rows.append({**row, "answer": example.answer, "answers": answers})
    features = datasets.Features(
        **{key: datasets.Value("string") for key in ("id", "kind", "chat", "answer")},
        images=datasets.List(datasets.Image()) if hasattr(datasets, "List") else [datasets.Image()],
        answers=datasets.List(datasets.Value("string")) if hasattr(datasets, "List") else [datasets.Value("string")],
    )
    file = folder / f"{name}.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(file))
    (folder / "utils.py").write_text(_UTILS, encoding="utf-8")
    (folder / f"{name}.yaml").write_text(_YAML.format(name=name, file=file, most=task.max_new_tokens), encoding="utf-8")
    return name
