# SPDX-License-Identifier: Apache-2.0
"""The Gradio part of the demo: what stands where, and which function runs when.

State is per session: the key of what was looked at, and the answers of a scene that was drawn for the user. Pictures of
results are in the page itself, so the server keeps no file of them.
"""

from __future__ import annotations

import filecmp
import functools
import html
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData
from PIL import Image

import vtprune

from .. import video, viz
from ..api import make_config
from ..errors import ConfigError, VTPruneError
from . import board, guard, pages, scenes
from .plot import AXES, plot
from .studio import Answer, Look, Studio, checked_keep, in_order, right

#: Events that use a model wait in one queue; of users who wait for other things, so many are served at once.
MODEL_QUEUE = {"concurrency_limit": 1, "concurrency_id": "model"}
QUEUE_LENGTH = 64
#: A session that rests for so long is forgotten, and so are files that it uploaded.
REST_SECONDS = 3600
COMPARED = 4
KEEP = 25
#: Longer side of a video's frames, and how many of them: what the embedded model was trained on, in about.
FRAME_SIDE, FRAMES, FPS = 336, 16, 2.0
#: Methods that a plot begins with, where the results have them.
SHOWN_LINES = ("dense", "downsample", "downsampled picture", "random", "grid", "norm", "divprune", "idpruner")
EXAMPLES = (("basic", 3), ("clutter", 12), ("extended", 4), ("hires", 1))
TITLE = "vtprune"
INTRO = """# vtprune
A vision-language model answers from the visual tokens that matter. Ask about a picture twice, with all of them and with
those that a method keeps, and see which these are."""
POCKET = "The embedded models know the words of PocketVQA only: take a question from the list, or one like those in it."


def guarded_picture(**settings: Any) -> Any:
    """An image component whose upload is opened by `guard`.

    The method is set on the component: of a class that extends one of its own, Gradio writes a stub beside the source.
    """
    component = gr.Image(type="pil", **settings)
    opened = shown_errors(guard.picture)
    component.preprocess = lambda payload: None if payload is None else opened(payload.path or "")
    return component


def plain_video(**settings: Any) -> Any:
    """A video component that hands the path of an upload on, for `guard` to open; nothing is converted."""
    component = gr.Video(**settings)
    component.preprocess = lambda payload: None if payload is None else payload.path
    component.postprocess = lambda value: None if value is None else FileData(path=value, orig_name=Path(value).name)
    return component


def uploads_alone(block: Any) -> None:
    """Let the browser hand over what it has uploaded, and no address: Gradio would fetch it, without our limits."""
    move = block.async_move_resource_to_block_cache

    async def moved(path: Any) -> Any:
        if re.match(r"\w+://", str(path)):
            raise gr.Error("addresses are not fetched here; upload the file", print_exception=False)
        return await move(path)

    block.async_move_resource_to_block_cache = moved


def shown_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of ours reach the user in words; those of others stay in the log."""
    return functools.wraps(function)(lambda *given: _guarded(function, *given))


def _guarded(function: Callable[..., Any], *given: Any) -> Any:
    try:
        return function(*given)
    except VTPruneError as error:
        raise gr.Error(str(error), duration=15, print_exception=False) from None


def streamed_errors(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """As `shown_errors`, for functions that yield."""

    @functools.wraps(function)
    def run(*given: Any) -> Iterator[Any]:
        try:
            yield from function(*given)
        except VTPruneError as error:
            raise gr.Error(str(error), duration=15, print_exception=False) from None

    return run


class App:
    """The demo.

    Parameters
    ----------
    studio
        Does the work.
    results
        Folder of results for the board; None where there is none.
    video_backend
        What reads videos; see `vtprune.video.read`.
    """

    def __init__(self, studio: Studio, results: Path | None = None, video_backend: str | None = None) -> None:
        self.studio = studio
        self.video_backend = video_backend
        self.results = board.read(results) if results is not None else {}
        self.folder = Path(tempfile.mkdtemp(prefix="examples-", dir=os.environ.get("GRADIO_TEMP_DIR")))
        fixed = [scenes.draw(world, number) for world, number in EXAMPLES]
        #: Answers of scenes that everybody is shown, by the digest of their picture.
        self.known = {scenes.digest(scene.picture): scene.answers for scene in fixed}
        self.first = fixed[0]
        self.examples = []
        for scene in fixed:
            path = self.folder / f"{scene.name.replace(' ', '-')}.png"
            scene.picture.save(path)
            self.examples.append((str(path), scene))
        #: Of all methods; a page narrows them to those that its model can be pruned with.
        self.methods = in_order(vtprune.methods())
        self.clip = scenes.clip(2)
        self.clip_path = self.folder / "clip-2.mp4"
        if "av" in video.backends():
            video.write(self.clip_path, self.clip.frames, FPS)

    # -- what runs ----------------------------------------------------------------------------------------------------

    def answers_of(self, picture: Image.Image, scene: dict[str, Any] | None) -> dict[str, str]:
        """Known answers about a picture: those of the user's own scene, or of an example."""
        key = scenes.digest(picture)
        if scene is not None and scene["digest"] == key:
            return dict(scene["answers"])
        return self.known.get(key, {})

    def make_scene(self, world: str) -> Any:
        """A scene that nobody has seen, and what is known about it; the change of the picture does the rest."""
        scene = scenes.draw(world, random.SystemRandom().randrange(scenes.SCENES))
        return scene.picture, {"digest": scenes.digest(scene.picture), "answers": scene.answers}

    def take_example(self, chosen: gr.SelectData) -> Any:
        """The example that was clicked."""
        return self.examples[chosen.index][1].picture

    def scene_changed(self, picture: Image.Image | None, scene: dict[str, Any] | None, question: str) -> Any:
        """What can be asked about another picture, where that is known."""
        asked = list(self.answers_of(picture, scene)) if picture is not None else []
        if not asked:
            # What is being typed stays.
            return gr.update(choices=[], value=None, visible=False), gr.skip()
        chosen = question if question in asked else asked[0]
        return gr.update(choices=asked, value=chosen, visible=True), chosen

    def narrow(self, name: str) -> Any:
        """Choices that a model has: methods, methods to compare, worlds of scenes; and that it is there."""
        loaded = self.studio.load(name)
        methods, worlds = list(loaded.methods), list(scenes.worlds_of(name))
        return (
            gr.update(choices=methods, value=methods[0]),
            gr.update(choices=methods, value=methods[:3]),
            gr.update(choices=worlds, value=worlds[0]),
            f'<p id="ready" class="vt-hint" role="status">{html.escape(name)} is ready; {len(methods)} methods</p>',
        )

    def narrow_clip(self, method: str) -> Any:
        """Methods of the model that takes clips."""
        methods = list(self.studio.load(self.studio.video_model()).methods)
        return gr.update(choices=methods, value=method if method in methods else methods[0])

    def _look(self, picture: Image.Image | None, question: str, model: str) -> Look:
        if picture is None:
            raise ConfigError("there is no picture yet; upload one, take an example, or make a scene")
        return self.studio.look(model, (picture,), guard.question(question))

    def ask(
        self,
        key: str | None,
        scene: dict[str, Any] | None,
        picture: Image.Image | None,
        question: str,
        model: str,
        method: str,
        percent: float,
    ) -> Iterator[Any]:
        """Both answers, as they come. Yields the key of the look, the answers, the overlay."""
        keep = checked_keep(percent)
        look = self._look(picture, question, model)
        assert picture is not None
        known = self.answers_of(picture, scene).get(look.question)
        self.studio.forget(key)
        yield from self._answers(look, method, keep, known)

    def _answers(self, look: Look, method: str, keep: float, known: str | None) -> Iterator[Any]:
        make_config(method, keep=keep)  # whatever is wrong with it is said before the model is asked
        look.wanted = (method, keep)
        look.known = known
        key = self.studio.remember(look)
        look.drawn = self._drawn(look, method, keep)
        look.said = pages.answers(None, None, method, known)
        yield key, look.said, look.drawn
        for answer, _ in self.studio.answer(look, None):
            look.dense = answer
            look.said = pages.answers(answer, None, method, known)
            yield key, look.said, look.drawn
        yield from ((key, *rest) for rest in self._pruned(look, method, keep))

    def _pruned(self, look: Look, method: str, keep: float) -> Iterator[Any]:
        """The pruned answer beside the dense one, and, where only an answer tells, what was kept.

        It ends where the slider has moved on, so that no late answer undoes what the slider shows. What has not changed
        is said again and not skipped: for each `gr.skip` of an HTML component Gradio keeps a copy of it for good.
        """
        for answer, report in self.studio.answer(look, make_config(method, keep=keep)):
            if look.wanted != (method, keep):
                return
            look.said = pages.answers(look.dense, answer, method, look.known)
            if report is not None:
                alt = pages.described(report, method)
                look.drawn = pages.picture(look.draw(report, method), alt) + pages.note(alt)
            yield look.said, look.drawn

    def _drawn(self, look: Look, method: str, keep: float) -> str:
        try:
            report = look.choose(method, keep)
        except ConfigError:  # it acts inside the language model
            return pages.note(f"{method} chooses inside the language model; what it keeps is known with the answer.")
        alt = pages.described(report, method)
        return pages.picture(look.draw(report, method), alt) + pages.note(alt)

    def redraw(self, key: str | None, method: str, percent: float) -> Any:
        """What a slider shows at once: choosing again needs no model."""
        look = self.studio.recall(key)
        if look is None:
            return gr.skip()
        keep = checked_keep(percent)
        look.wanted = (method, keep)
        look.drawn = self._drawn(look, method, keep)
        return look.drawn

    def answer_again(self, key: str | None, method: str, percent: float) -> Iterator[Any]:
        """The answer that follows, unless the slider has moved on."""
        look, keep = self.studio.recall(key), checked_keep(percent)
        if look is None:
            yield gr.skip(), gr.skip()
            return
        yield look.said, look.drawn
        if look.dense is not None and look.wanted == (method, keep):
            yield from self._pruned(look, method, keep)

    def compare(
        self,
        scene: dict[str, Any] | None,
        picture: Image.Image | None,
        question: str,
        model: str,
        methods: list[str],
        percent: float,
    ) -> Iterator[Any]:
        """The picture of what each method keeps, a table, the orders of choice."""
        keep = checked_keep(percent)
        if not 2 <= len(methods) <= COMPARED:
            raise ConfigError(f"{len(methods)} methods are chosen; choose two to {COMPARED} to compare")
        look = self._look(picture, question, model)
        assert picture is not None
        answers = self.answers_of(picture, scene)
        others = {q: self.studio.look(model, (picture,), q) for q in answers if q != look.question}
        header = [
            "method",
            "answer",
            *(["right", "right on this scene"] if answers else []),
            "tokens",
            "first token ms",
        ]
        rows: list[list[str]] = []
        reports = {}
        configs = {"all tokens": None, **{method: make_config(method, keep=keep) for method in methods}}
        for name, config in configs.items():
            answer, report = self.studio.answer_now(look, config)
            if report is not None:
                reports[name] = report
            rows.append([name, answer.text, *self._verdicts(look, others, config, answer, answers), *_costs(answer)])
            table = pages.table(header, rows, f"{look.question} Each method keeps {percent:.0f}%.")
            yield "", table, ""
        alt = "; ".join(pages.described(report, name) for name, report in reports.items())
        yield pages.picture(viz.compare(look.shown[0], reports), alt), table, self._orders(look, reports)

    def _verdicts(
        self, look: Look, others: dict[str, Look], config: Any, answer: Answer, answers: dict[str, str]
    ) -> list[str]:
        """Whether the answer is right, and how many of all questions with known answers are."""
        if not answers:
            return []
        said = {question: self.studio.answer_now(other, config)[0] for question, other in others.items()}
        said[look.question] = answer
        good = sum(said[question].text == known for question, known in answers.items())
        verdict = right(answer.text, answers.get(look.question))
        mark = "not known" if verdict is None else pages.verdict_mark(verdict)
        return [mark, f"{good} of {len(answers)}"]

    def _orders(self, look: Look, reports: dict[str, Any]) -> str:
        shown = []
        for name, report in reports.items():
            if any(segment.order is None for segment in report.segments):
                shown.append((f"{name} chooses all its tokens at once", ""))
            else:
                drawn = viz.order(look.shown[0], report, name)
                alt = f"Order in which {name} chose its tokens, from light (first) to dark (last)"
                shown.append((f"Order of choice, {name}", pages.picture(drawn, alt)))
        return pages.gallery(shown)

    def lens(self, picture: Image.Image | None, question: str, model: str) -> Any:
        look = self._look(picture, question, model)
        seen = self.studio.lens(look)
        shown = look.shown if look.times is not None else look.shown[0]
        title = "What the visual tokens say"
        page = viz.lens_page(shown, seen, seen.layers[-1], seen.classes, title=title)
        why = "" if seen.classes is not None else pages.note(f"Tokens are not sorted into classes: {seen.why}")
        return pages.frame(page, f"{title}: a patch for each token, with its nearest words") + why

    def example_clip(self) -> Any:
        first = next(iter(self.clip.answers))
        return str(self.clip_path), first, gr.update(choices=list(self.clip.answers), value=first, visible=True)

    def ask_clip(self, key: str | None, path: str | None, question: str, method: str, percent: float) -> Iterator[Any]:
        keep = checked_keep(percent)
        if path is None:
            raise ConfigError("there is no video yet; upload one, or take the example")
        question = guard.question(question)
        clip = guard.clip(path, fps=FPS, frames=FRAMES, side=FRAME_SIDE, backend=self.video_backend)
        is_example = self.clip_path.exists() and filecmp.cmp(path, self.clip_path, shallow=False)
        known = self.clip.answers.get(question) if is_example else None
        self.studio.forget(key)
        look = self.studio.look(self.studio.video_model(), clip.frames, question, clip.times, clip.fps)
        yield from self._answers(look, method, keep, known)

    def plot(self, file: str | None, task: str | None, methods: list[str] | None, axis: str) -> Any:
        """The plot, the table, and what can be chosen."""
        results = self.results.get(file or "", [])
        tasks = list(dict.fromkeys(r.asked for r in results))
        task = task if task in tasks else next(iter(tasks), None)
        mine = [r for r in results if r.asked == task]
        names = list(dict.fromkeys(r.method for r in mine))
        chosen = [m for m in methods or () if m in names] or [m for m in SHOWN_LINES if m in names] or names[:8]
        shown = [r for r in mine if r.method in chosen]
        rows = [
            [
                r.method,
                r.keep,
                f"{r.tokens:.0f}",
                f"{r.accuracy:.3f}",
                "" if r.low is None or r.high is None else f"{r.low:.3f} to {r.high:.3f}",
                "" if r.ms is None else f"{r.ms:,.0f}",
            ]
            for r in shown
        ]
        table = pages.table(
            ["method", "keep", "tokens", "accuracy", "95% interval", "ms"], rows, f"{file}: {task or ''}"
        )
        drawn = plot(shown, axis) or pages.note(f"These results say nothing of {axis}.")
        return drawn, table, gr.update(choices=names, value=chosen), gr.update(choices=tasks, value=task)

    # -- what stands where --------------------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, REST_SECONDS)) as page:
            forget = self.studio.forget
            key = gr.State(None, time_to_live=REST_SECONDS, delete_callback=forget)
            clip_key = gr.State(None, time_to_live=REST_SECONDS, delete_callback=forget)
            scene = gr.State(None, time_to_live=REST_SECONDS)
            gr.Markdown(INTRO)
            with gr.Row(equal_height=False, elem_id="both"):
                with gr.Column(scale=2, min_width=300) as left:
                    given = self._inputs()
                with gr.Column(scale=3, min_width=320), gr.Tabs():
                    tabs = {}
                    with gr.Tab("Ask", id="ask") as tabs["ask"]:
                        asked = self._ask_tab()
                    with gr.Tab("Compare", id="compare") as tabs["compare"]:
                        compared = self._compare_tab()
                    with gr.Tab("Lens", id="lens") as tabs["lens"]:
                        seen = self._lens_tab()
                    with gr.Tab("Video", id="video") as tabs["video"]:
                        played = self._video_tab()
                    with gr.Tab("Board", id="board") as tabs["board"]:
                        self._board_tab(page)
            for name, tab in tabs.items():
                shows = name in ("ask", "compare", "lens")
                tab.select(
                    lambda shows=shows: gr.update(visible=shows), None, left, queue=False, show_progress="hidden"
                )
            self._wire_inputs(given, scene, key, asked, compared)
            self._wire_ask(given, scene, key, asked)
            compared["go"].click(
                streamed_errors(self.compare),
                [scene, given["picture"], given["question"], given["model"], compared["methods"], compared["keep"]],
                [compared["picture"], compared["table"], compared["orders"]],
                api_name="compare",
                **MODEL_QUEUE,
            )
            seen["go"].click(
                shown_errors(self.lens),
                [given["picture"], given["question"], given["model"]],
                seen["page"],
                api_name="lens",
                **MODEL_QUEUE,
            )
            self._wire_video(clip_key, played)
            tabs["video"].select(
                shown_errors(self.narrow_clip),
                played["method"],
                played["method"],
                show_progress="hidden",
                api_visibility="private",
            )
            # The model may still be loading: the page narrows its choices when it is there.
            page.load(
                shown_errors(self.narrow),
                given["model"],
                [asked["method"], compared["methods"], given["world"], given["status"]],
                api_visibility="private",
                show_progress="hidden",
            )
        for block in page.blocks.values():
            uploads_alone(block)
        return page

    def _inputs(self) -> dict[str, Any]:
        """What Ask, Compare and Lens share."""
        picture = guarded_picture(
            value=self.first.picture,
            format="png",
            label="Picture",
            sources=["upload", "webcam", "clipboard"],
            height=320,
            alt_text="The picture that is asked about",
            elem_id="picture",
            buttons=[],
        )
        with gr.Row():
            worlds = list(scenes.worlds_of(self.studio.default))
            world = gr.Dropdown(worlds, value=worlds[0], label="World", min_width=140, scale=1, elem_id="world")
            make = gr.Button("Make me a PocketVQA scene", scale=2, elem_id="make-scene")
        first = list(self.first.answers)
        question = gr.Textbox(first[0], label="Question", max_length=guard.MAX_QUESTION, lines=1, elem_id="question")
        asked = gr.Dropdown(
            first, value=first[0], label="Questions about this scene whose answers are known", elem_id="known"
        )
        model = gr.Dropdown(
            list(self.studio.names), value=self.studio.default, label="Model", elem_id="model", info=POCKET
        )
        status = gr.HTML(pages.note(f"{self.studio.default} is loading …"), elem_id="status", padding=False)
        examples = gr.Gallery(
            [(path, scene.name) for path, scene in self.examples],
            label="Examples",
            columns=4,
            height=150,
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="examples",
        )
        return {
            "picture": picture,
            "world": world,
            "make": make,
            "question": question,
            "known": asked,
            "model": model,
            "status": status,
            "examples": examples,
        }

    def _method(self, prefix: str) -> dict[str, Any]:
        with gr.Row():
            method = gr.Dropdown(
                self.methods, value=self.methods[0], label="Method", min_width=140, elem_id=f"{prefix}-method"
            )
            keep = gr.Slider(
                1, 100, KEEP, step=1, label="Visual tokens kept, %", min_width=180, elem_id=f"{prefix}-keep", buttons=[]
            )
        return {"method": method, "keep": keep}

    def _ask_tab(self) -> dict[str, Any]:
        parts = self._method("ask")
        go = gr.Button("Ask", variant="primary", elem_id="ask-go")
        answers = gr.HTML(elem_id="ask-answers", padding=False)
        overlay = gr.HTML(
            pages.note("Ask, and the patches that were kept show here. Then move the slider."),
            elem_id="ask-overlay",
            padding=False,
        )
        return {**parts, "go": go, "answers": answers, "overlay": overlay}

    def _compare_tab(self) -> dict[str, Any]:
        methods = gr.Dropdown(
            self.methods,
            value=self.methods[:3],
            multiselect=True,
            max_choices=COMPARED,
            label="Methods, two to four",
            elem_id="compare-methods",
        )
        keep = gr.Slider(1, 100, KEEP, step=1, label="Visual tokens kept, %", elem_id="compare-keep", buttons=[])
        go = gr.Button("Compare", variant="primary", elem_id="compare-go")
        table = gr.HTML(elem_id="compare-table", padding=False)
        picture = gr.HTML(elem_id="compare-picture", padding=False)
        orders = gr.HTML(elem_id="compare-orders", padding=False)
        return {"methods": methods, "keep": keep, "go": go, "table": table, "picture": picture, "orders": orders}

    def _lens_tab(self) -> dict[str, Any]:
        gr.Markdown(
            "Which words is each visual token nearest to, and is it a sink, dead or alive? Hover or tap a patch; arrow "
            "keys move from patch to patch."
        )
        go = gr.Button("Look", variant="primary", elem_id="lens-go")
        return {"go": go, "page": gr.HTML(elem_id="lens-page", padding=False)}

    def _video_tab(self) -> dict[str, Any]:
        clip = plain_video(
            label="Video, at most 60 s and 25 MB", sources=["upload"], height=280, elem_id="clip", buttons=[]
        )
        example = gr.Button("Take the example", elem_id="clip-example", interactive=self.clip_path.exists())
        question = gr.Textbox(label="Question", max_length=guard.MAX_QUESTION, lines=1, elem_id="clip-question")
        known = gr.Dropdown(
            [], label="Questions about the example whose answers are known", visible=False, elem_id="clip-known"
        )
        parts = self._method("clip")
        go = gr.Button("Ask about the video", variant="primary", elem_id="clip-go")
        answers = gr.HTML(elem_id="clip-answers", padding=False)
        strip = gr.HTML(elem_id="clip-strip", padding=False)
        return {
            **parts,
            "clip": clip,
            "example": example,
            "question": question,
            "known": known,
            "go": go,
            "answers": answers,
            "strip": strip,
        }

    def _board_tab(self, page: gr.Blocks) -> None:
        if not self.results:
            gr.Markdown(
                "There are no results. Start the demo with `--results FOLDER`, a folder of what `vtprune eval` wrote "
                "(`--out rows.jsonl`, `--table rows.csv`)."
            )
            return
        files = list(self.results)
        first = "accuracy-cpu.csv" if "accuracy-cpu.csv" in files else files[0]
        with gr.Row():
            file = gr.Dropdown(files, value=first, label="Results", elem_id="board-file")
            task = gr.Dropdown([], label="Model and task", elem_id="board-task")
            axis = gr.Radio(list(AXES), value="visual tokens", label="Accuracy over", elem_id="board-axis")
        methods = gr.Dropdown([], multiselect=True, label="Methods", elem_id="board-methods")
        drawn = gr.HTML(elem_id="board-plot", padding=False)
        table = gr.HTML(elem_id="board-table", padding=False)
        inputs, outputs = [file, task, methods, axis], [drawn, table, methods, task]
        settings: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        for changed in (file, task):
            changed.input(lambda f, t, _, a: self.plot(f, t, None, a), inputs, outputs, **settings)
        for changed in (methods, axis):
            changed.input(self.plot, inputs, outputs, **settings)
        page.load(self.plot, inputs, outputs, **settings)

    # -- which function runs when -------------------------------------------------------------------------------------

    def _wire_inputs(
        self, given: dict[str, Any], scene: Any, key: Any, asked: dict[str, Any], compared: dict[str, Any]
    ) -> None:
        picture, question, known = given["picture"], given["question"], given["known"]
        given["make"].click(shown_errors(self.make_scene), given["world"], [picture, scene], api_name="make_scene")
        given["examples"].select(
            shown_errors(self.take_example), None, picture, show_progress="hidden", api_visibility="private"
        )
        picture.change(
            self.scene_changed,
            [picture, scene, question],
            [known, question],
            show_progress="hidden",
            api_visibility="private",
        )
        known.input(lambda text: text, known, question, show_progress="hidden", api_visibility="private", queue=False)
        given["model"].input(
            shown_errors(self.narrow),
            given["model"],
            [asked["method"], compared["methods"], given["world"], given["status"]],
            api_visibility="private",
        ).then(lambda: None, None, key, api_visibility="private")  # what another model saw is no longer asked about

    def _wire_ask(self, given: dict[str, Any], scene: Any, key: Any, asked: dict[str, Any]) -> None:
        choice = [asked["method"], asked["keep"]]
        gr.on(
            [asked["go"].click, given["question"].submit],
            streamed_errors(self.ask),
            [key, scene, given["picture"], given["question"], given["model"], *choice],
            [key, asked["answers"], asked["overlay"]],
            api_name="ask",
            show_progress_on=asked["answers"],
            **MODEL_QUEUE,
        )
        self._wire_choice(key, asked["method"], asked["keep"], asked["answers"], asked["overlay"], "")

    def _wire_choice(self, key: Any, method: Any, keep: Any, answers: Any, overlay: Any, suffix: str) -> None:
        """A slider that redraws at once, and an answer that follows."""
        for number, event in enumerate((keep.input, method.input)):
            event(
                shown_errors(self.redraw),
                [key, method, keep],
                overlay,
                queue=False,
                trigger_mode="always_last",
                show_progress="hidden",
                api_name=f"redraw{suffix}" if number == 0 else None,
            ).then(
                streamed_errors(self.answer_again),
                [key, method, keep],
                [answers, overlay],
                trigger_mode="always_last",
                show_progress="hidden",
                api_visibility="private",
                **MODEL_QUEUE,
            )

    def _wire_video(self, key: Any, played: dict[str, Any]) -> None:
        played["example"].click(
            shown_errors(self.example_clip),
            None,
            [played["clip"], played["question"], played["known"]],
            api_visibility="private",
        )
        played["known"].input(
            lambda text: text,
            played["known"],
            played["question"],
            show_progress="hidden",
            queue=False,
            api_visibility="private",
        )
        gr.on(
            [played["go"].click, played["question"].submit],
            streamed_errors(self.ask_clip),
            [key, played["clip"], played["question"], played["method"], played["keep"]],
            [key, played["answers"], played["strip"]],
            api_name="ask_video",
            show_progress_on=played["answers"],
            **MODEL_QUEUE,
        )
        self._wire_choice(key, played["method"], played["keep"], played["answers"], played["strip"], "_video")


def _costs(answer: Answer) -> list[str]:
    return [str(answer.tokens), f"{answer.first_ms:,.0f}"]


def theme() -> Any:
    """Fonts that are there already: nothing is fetched from anywhere."""
    sans = ["system-ui", "Segoe UI", "Noto Sans", "DejaVu Sans", "sans-serif"]
    return gr.themes.Default(font=sans, font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"], primary_hue="blue")
