# SPDX-License-Identifier: Apache-2.0
"""What the demo computes: encode once, choose at any budget, answer token by token. Knows nothing of Gradio.

All work on models is done by one thread, so that users wait for each other in turn; choosing tokens of a picture that
is encoded already is done by whoever asks, and waits for nobody.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

import vtprune

from .. import viz
from ..api import make_config
from ..config import PruneConfig
from ..engine.report import ImageReport, prefill_flops
from ..errors import ConfigError, InputError, VTPruneError
from ..eval import Example
from ..eval.controls import prepare
from ..lens.probe import Lens
from ..models import find_family
from ..models.base import Family
from ..models.loading import build_inputs, embedded_models
from ..tokens import Selection, VisualTokens

MAX_NEW_TOKENS = 64
#: Encoded pictures that are kept for sliders, of all users together; the longest unused goes first.
LOOKS = 32
#: Takes clips, where the model of the demo does not.
VIDEO_MODEL = "pocket-qwen2.5-vl"
#: Shown first: the default, the baselines, then by name.
FIRST = ("idpruner", "divprune", "norm", "random")


@dataclass(frozen=True)
class Loaded:
    """A model, its processor, its family, and the methods that it can be pruned with."""

    name: str
    model: Any
    processor: Any
    family: Family
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """One answer, so far.

    Parameters
    ----------
    text
        What has been generated.
    tokens
        Visual tokens that the language model was given.
    first_ms, total_ms
        Time until the first token (vision tower, choice and prefill within) and until the last one.
    flops
        Operations of the language model's prefill, counted from its shapes.
    cache_mib
        Keys and values that it holds at the end.
    peak_mib
        GPU memory beyond the weights, at most; None on a CPU.
    done
        Whether it is whole. The last three numbers are 0 before.
    """

    text: str = ""
    tokens: int = 0
    first_ms: float = 0.0
    total_ms: float = 0.0
    flops: int = 0
    cache_mib: float = 0.0
    peak_mib: float | None = None
    done: bool = False


@dataclass
class Look:
    """A picture or clip with a question, encoded.

    Parameters
    ----------
    loaded
        The model that looked.
    shown
        What it saw: one picture, or the frames of a clip.
    times
        When the frames of a clip are shown, in seconds.
    inputs
        What its processor made of picture and question.
    tokens
        What pruners see.
    orders
        By method, everything in the order of choice.
    wanted
        What a slider was last moved to: method and budget.
    dense
        The answer with all tokens, once there is one.
    known
        The right answer, where it is known.
    """

    loaded: Loaded
    question: str
    shown: tuple[Image.Image, ...]
    times: tuple[float, ...] | None
    inputs: dict[str, Any]
    tokens: VisualTokens
    orders: dict[str, Selection] = field(default_factory=dict)
    wanted: tuple[str, float] | None = None
    dense: Answer | None = None
    known: str | None = None

    def choose(self, method: str, keep: float) -> ImageReport:
        """What a method keeps, from the order that it was asked for once.

        A method with an order keeps a prefix of it at any budget. One without chooses anew, from what is encoded.

        Raises
        ------
        ConfigError
            The method acts inside the language model, so only an answer tells.
        """
        full = self.orders.get(method)
        if full is None:
            # Whole, and once: budgets are then a matter of slicing.
            full = self.orders[method] = vtprune.select(self.tokens, method, keep=1.0)
        if full.order is None:
            return viz.chosen(self.tokens, vtprune.select(self.tokens, method, keep=keep))
        lens, counts = make_config(method, keep=keep).budget().pools(self.tokens)
        parts, start = [], 0
        for length, count in zip(lens, counts, strict=True):
            parts.append(full.order[start : start + count])
            start += length
        return viz.chosen(self.tokens, Selection.from_order(torch.cat(parts), self.tokens))

    def draw(self, report: ImageReport, method: str) -> Image.Image:
        """Kept patches on the picture, or on the frames."""
        if self.times is not None:
            return viz.video_strip(self.shown, report, method, self.times)
        return viz.overlay(self.shown[0], report, method)


class Studio:
    """Models, and what was looked at with them.

    Parameters
    ----------
    model
        An embedded model, a checkpoint folder or a hub name: the one that is shown first. The embedded ones can be
        chosen beside it, and nothing else can.
    device, dtype
        As for `vtprune.load`.
    """

    def __init__(self, model: str = "pocket-llava", device: str | None = None, dtype: Any = None) -> None:
        self.default = model
        self.names = (model, *(name for name in embedded_models() if name != model))
        self._settings = {"device": device, "dtype": dtype}
        self._models: dict[str, Future[Loaded]] = {}
        self._looks: OrderedDict[str, Look] = OrderedDict()
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="vtprune-model")

    # -- models -------------------------------------------------------------------------------------------------------

    def load(self, name: str) -> Loaded:
        """A model by one of `names`; loaded when it is first asked for."""
        return self._loading(name).result()

    def start(self) -> None:
        """Begin to load the first model, and let it answer once so that the first user need not wait for that."""

        def warm_up() -> None:
            loaded = self._loading(self.default).result()
            # What goes wrong here goes wrong again, with a message, where somebody asked.
            with contextlib.suppress(Exception):
                look = self.look(loaded.name, (Image.new("RGB", (336, 336), "white"),), "what is there ?")
                for config in (None, make_config("idpruner", keep=0.25)):
                    list(self.answer(look, config))

        threading.Thread(target=warm_up, daemon=True).start()

    def _loading(self, name: str) -> Future[Loaded]:
        if name not in self.names:
            raise ConfigError(f"model {name!r} is not among those of this demo; choose one of {', '.join(self.names)}")
        with self._lock:
            if name not in self._models or self._failed(name):
                self._models[name] = self._worker.submit(self._load, name)
            return self._models[name]

    def _failed(self, name: str) -> bool:
        found = self._models[name]
        return found.done() and found.exception() is not None

    def _load(self, name: str) -> Loaded:
        model, processor = vtprune.load(name, **self._settings)
        usable = []
        for method in vtprune.methods():
            # Nothing is run: this only asks whether the method can serve the model.
            with contextlib.suppress(VTPruneError), vtprune.using(model, method, keep=0.25):
                usable.append(method)
        return Loaded(name, model, processor, find_family(model), tuple(in_order(usable)))

    def video_model(self) -> str:
        """The demo's model where it takes clips, else the embedded one that does."""
        loaded = self.load(self.default)
        takes = "video" in loaded.family.placeholders and hasattr(loaded.processor, "video_processor")
        return self.default if takes else VIDEO_MODEL

    # -- looking ------------------------------------------------------------------------------------------------------

    def look(
        self,
        name: str,
        frames: Sequence[Image.Image],
        question: str,
        times: Sequence[float] | None = None,
        fps: float | None = None,
    ) -> Look:
        """Encode one picture, or the frames of a clip (which has `times` and `fps`), with a question."""
        loaded = self.load(name)
        return self._worker.submit(self._look, loaded, tuple(frames), question, times, fps).result()

    def _look(
        self,
        loaded: Loaded,
        frames: tuple[Image.Image, ...],
        question: str,
        times: Sequence[float] | None,
        fps: float | None,
    ) -> Look:
        shown = frames
        if times is None:
            inputs = dict(build_inputs(loaded.model, loaded.processor, frames[0], question))
            shown = (viz.seen_image(loaded.processor, inputs, frames[0]),)
        else:
            content = [{"type": "video", "video": list(frames), "fps": fps}, {"type": "text", "text": question}]
            example = Example("demo", "demo", "", ({"role": "user", "content": content},), "")
            inputs = prepare(loaded.family, loaded.processor, [example])
        tokens = vtprune.encode(loaded.model, inputs)
        return Look(loaded, question, shown, None if times is None else tuple(times), inputs, tokens)

    def remember(self, look: Look) -> str:
        """Keep a look for its user's slider. The key is nobody else's to guess."""
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._looks[key] = look
            while len(self._looks) > LOOKS:
                self._looks.popitem(last=False)
        return key

    def recall(self, key: str | None) -> Look | None:
        """The look of that key, if it is still there."""
        with self._lock:
            if key is None or key not in self._looks:
                return None
            self._looks.move_to_end(key)
            return self._looks[key]

    def forget(self, key: str | None) -> None:
        """Let a look go."""
        with self._lock:
            self._looks.pop(key, None)  # type: ignore[arg-type]

    def lens(self, look: Look, topk: int = 5) -> Lens:
        """The nearest words of every visual token at every layer."""
        loaded = look.loaded
        return self._worker.submit(
            vtprune.lens, loaded.model, look.inputs, None, topk, processor=loaded.processor
        ).result()

    # -- answering ----------------------------------------------------------------------------------------------------

    def answer(
        self, look: Look, config: PruneConfig | None, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> Iterator[tuple[Answer, ImageReport | None]]:
        """Answer token by token, with all visual tokens (no config) or those that a method keeps.

        Yields
        ------
        answer, report
            The last one is `done` and comes with what was kept. Who stops reading stops the model.
        """
        said: queue.SimpleQueue[tuple[Answer, ImageReport | None] | None] = queue.SimpleQueue()
        stop = threading.Event()
        work = self._worker.submit(self._answer, look, config, max_new_tokens, said.put, stop)
        work.add_done_callback(lambda _: said.put(None))
        try:
            while (item := said.get()) is not None:
                yield item
            work.result()
        finally:
            stop.set()

    def answer_now(self, look: Look, config: PruneConfig | None) -> tuple[Answer, ImageReport | None]:
        """The whole answer."""
        *_, last = self.answer(look, config)
        return last

    def _answer(
        self,
        look: Look,
        config: PruneConfig | None,
        max_new_tokens: int,
        say: Callable[[tuple[Answer, ImageReport | None]], None],
        stop: threading.Event,
    ) -> None:
        if stop.is_set():
            return
        model, on_gpu = look.loaded.model, look.loaded.model.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        voice = _Voice(look.loaded.processor, stop, lambda text: say((Answer(text), None)), on_gpu)
        with vtprune.using(model, config):
            out = model.generate(
                **look.inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                streamer=voice,
                stopping_criteria=[voice.stopped],
                return_dict_in_generate=True,
            )
            total = voice.elapsed_ms()
            report = vtprune.report(model) if config is not None else None
        if report is None:
            tokens, flops = len(look.tokens.source), self._dense_flops(look)
        else:
            tokens, flops = report.tokens_out, report.flops_after
        cache = sum(
            state.numel() * state.element_size()
            for layer in out.past_key_values.layers
            for state in (layer.keys, layer.values)
            if state is not None
        )
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else None
        answer = Answer(voice.text, tokens, voice.first_ms, total, flops, cache / 2**20, peak, True)
        say((answer, report.images[0] if report else None))

    @staticmethod
    def _dense_flops(look: Look) -> int:
        config = look.loaded.model.config.text_config
        return config.num_hidden_layers * prefill_flops(look.inputs["input_ids"].shape[1], config)


class _Voice:
    """A streamer for generate() that tells the text so far, notes times, and can be told to stop."""

    def __init__(self, processor: Any, stop: threading.Event, say: Callable[[str], None], on_gpu: bool) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.stop, self.say, self.on_gpu = stop, say, on_gpu
        self.ids: list[int] = []
        self.text, self.first_ms, self.prompted = "", 0.0, False
        self.start = time.perf_counter()

    def put(self, tokens: torch.Tensor) -> None:
        if not self.prompted:  # the first call brings the prompt
            self.prompted = True
            return
        if not self.ids:
            self.first_ms = self.elapsed_ms()
        self.ids += tokens.flatten().tolist()
        self.text = self.tokenizer.decode(self.ids, skip_special_tokens=True).strip()
        self.say(self.text)

    def end(self) -> None:
        pass

    def stopped(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), self.stop.is_set(), device=ids.device)

    def elapsed_ms(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - self.start)


def right(answer: str, known: str | None) -> bool | None:
    """Whether an answer is the known one; None where none is known."""
    return None if known is None else answer.strip() == known


def in_order(methods: Iterable[str]) -> list[str]:
    """Names of methods, those that are shown first in front."""
    known = list(methods)
    return [*(m for m in FIRST if m in known), *(m for m in known if m not in FIRST)]


def checked_keep(percent: float) -> float:
    """A slider's percentage as a budget.

    Raises
    ------
    InputError
        It is none.
    """
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 < percent <= 100:
        raise InputError(f"{percent!r} % cannot be kept; choose more than 0 and at most 100")
    return float(percent) / 100
