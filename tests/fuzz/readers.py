# SPDX-License-Identifier: Apache-2.0
"""Whatever a user may hand in as text or as a file, made wrong: one error of ours that says so, or none; never a hang.

Most cases are sound documents with a few edits: values of other types, missing and doubled keys, cut and flipped bytes.
`guided` runs the same cases under a coverage-guided fuzzer.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from eval.test_local import MAKERS
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import vtprune
from vtprune import cli, video
from vtprune.budget import parse_keep
from vtprune.cli.common import config_of, open_image
from vtprune.demo import guard
from vtprune.errors import ConfigError, VTPruneError
from vtprune.eval import papers, runner, table
from vtprune.eval.tasks import get
from vtprune.lens import Calibration
from vtprune.lens.probe import Lens, View
from vtprune.pruners.scorer import Scorer
from vtprune.pruners.scorer import load as load_scorer

#: A case that takes longer hangs.
SECONDS = 20


@dataclass(frozen=True)
class Case:
    target: str
    payload: Any


# -- documents and how they go wrong ----------------------------------------------------------------------------------

_words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(("", "norm", "0.25", "../..", "\n", "a\nb", "\x00", "nan", "é", "/")),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from((0, -1, 2**63, 10**40, math.nan, math.inf, -math.inf, 1e308, 0.5)),
    st.floats(),
    _words,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_words, inner, max_size=3)),
    max_leaves=5,
)


def _edit(draw: st.DrawFn, document: Any) -> Any:
    """One change at some place of a JSON document."""
    if not isinstance(document, dict | list) or not document or draw(st.integers(0, 4)) == 0:
        return draw(values)
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = draw(st.sampled_from(keys))
    how = draw(st.integers(0, 9))
    if how == 0:
        del document[key]
    elif how == 1 and isinstance(document, dict):
        document[draw(_words)] = document.pop(key)
    elif how == 2:
        if isinstance(document, list):
            document.append(deepcopy(document[key]))
        else:
            document[draw(_words)] = draw(values)
    else:
        document[key] = _edit(draw, document[key])
    return document


@st.composite
def documents(draw: st.DrawFn, *sound: Any, cut: bool = True) -> str:
    """JSON text that began as one of these."""
    document = deepcopy(draw(st.sampled_from(sound)))
    for _ in range(draw(st.integers(0, 3))):
        document = _edit(draw, document)
    text = json.dumps(document)
    return draw(texts(text)) if cut and draw(st.integers(0, 3)) == 0 else text


@st.composite
def texts(draw: st.DrawFn, *sound: str) -> str:
    """Text that began as one of these."""
    text = draw(st.sampled_from(sound))
    for _ in range(draw(st.integers(0, 3))):
        at, to = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        how = draw(st.integers(0, 4))
        if how == 0:
            text = text[:at]
        elif how == 1:
            text = text[:at] + text[to:][:500] + text[at:]
        elif how == 2:
            text = text[:at] + draw(_words) + text[at:]
        elif how == 3:
            text = text[:at] + text[at + draw(st.integers(0, 9)) :]
        else:
            text = text[:at] + draw(st.sampled_from("[{")) * draw(st.sampled_from((1, 50, 5_000))) + text[at:]
    return text


@st.composite
def blobs(draw: st.DrawFn, *sound: bytes) -> bytes:
    """Bytes that began as one of these."""
    data = draw(st.sampled_from(sound))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.integers(0, 6))
        if how == 0:
            data = data[:at]
        elif how == 1:
            data = data[:at] + draw(st.binary(max_size=8)) + data[at:]
        elif how == 2:
            data = data[:at] + data[at + draw(st.integers(1, 64)) :]
        else:  # headers are where it hurts
            at = at if how == 3 else at % 256
            data = data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at + 1 :]
    return data


# -- sound documents --------------------------------------------------------------------------------------------------


@cache
def _folder() -> Path:
    """Of this process."""
    return Path(tempfile.mkdtemp(prefix="vtprune-fuzz-"))


@cache
def _pictures() -> tuple[bytes, ...]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for kind, options in (("PNG", {}), ("JPEG", {"exif": exif}), ("WEBP", {"exif": exif}), ("GIF", {}), ("BMP", {}),
                          ("TIFF", {})):  # fmt: skip
        stream = io.BytesIO()
        noise.save(stream, kind, **options)
        found.append(stream.getvalue())
    return tuple(found)


@cache
def _clips() -> tuple[bytes, ...]:
    frames = [Image.new("RGB", (32, 32), (40 * i, 90, 20)) for i in range(5)]
    found = []
    for suffix, codec in ((".mp4", "libx264"), (".webm", "libvpx"), (".avi", "mpeg4")):
        path = _folder() / f"sound{suffix}"
        video.write(path, frames, 5.0, codec)
        found.append(path.read_bytes())
    return tuple(found)


@cache
def _scorers() -> tuple[bytes, ...]:
    return (save(Scorer(4).state_dict()), save({}), save({"query.weight": Scorer(4).query.weight.data.int()}))


CONFIGS = tuple(
    json.loads(config.to_json())
    for config in (
        vtprune.PruneConfig(),
        vtprune.PruneConfig("idpruner", 0.5, "compact", "joint", "pooled", False, {"importance": "norm"}),
        vtprune.PruneConfig(["norm", "divprune"], [0.5, 3]),
        vtprune.PruneConfig("zoo", 16, options={"estimator": "jvp", "m": 4, "h": 0.1, "seed": 3}),
        vtprune.PruneConfig("sparsevlm", options={"layers": [1, 2], "recycle": 0.5}),
        vtprune.PruneConfig("random", options={"seed": 1, "layer": 2}),
        vtprune.PruneConfig("catp", options={"layer": 2, "text_weight": 0.1, "query_images": 2}),
    )
)  # fmt: skip
SPECS = (
    "norm", "norm+idpruner", "prumerge++idpruner", "idpruner importance=norm mmr_lambda=0.3", "worst of=divprune",
    "random seed=3 scope=joint allocation=pooled positions=compact", "dense", "downsample",
    "embedlens mode=drop classes=dead", "idpruner parallel_k=2",
)  # fmt: skip
KEEPS = ("0.25", "1/9", "25%", "128t", "1/2+64t", "1.0", "1")
CALIBRATION = {
    "checkpoint": "x", "vocabulary": 30, "width": 3, "anchors": {"dead": [1, 2], "vit_sink": [3]},
    "means": {"llm_sink": [0.1, 0.2, 0.3]}, "radius": 0.9, "excluded": [0], "top": 3, "words": {"dead": ["a", "b"]},
    "evidence": {"images": 3}, "version": 1,
}  # fmt: skip


@cache
def _lens() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    view = View(0, 0, "image", (1, 2), (0.0, 0.0, 1.0, 1.0), 2)
    ids, cosines = rng.integers(0, 9, (2, 2, 3)), rng.random((2, 2, 3), np.float32)
    made = Lens((0, 1), ids, cosines, np.zeros((2, 3), np.float32), (view,), {i: f"w{i}" for i in range(9)}, "x")
    return dict(json.loads(made.to_json()))


PAPER = """method = "norm"
paper = "arXiv 1"
source = "table 1"
[[table]]
model = "m"
tokens = 576
tolerance = 1.0
tasks = { GQA = "gqa", MME = "mme" }
dense = { GQA = 61.9, MME = 1862.0 }
[table.expected.norm."1/9"]
GQA = 60.0
average = 97.5
"""
CLAIMS = {
    "method": "norm", "paper": "arXiv 1", "source": "table 1",
    "table": [{"model": "m", "tokens": 576, "tolerance": 1.0, "tasks": {"GQA": "gqa", "MME": "mme"},
               "dense": {"GQA": 61.9, "MME": 1862}, "expected": {"norm": {"1/9": {"GQA": 60.0, "average": 97.5}}}}],
}  # fmt: skip


def _toml(value: Any, top: bool = True) -> str:
    """TOML of a JSON document; what it has no word for is text."""
    if isinstance(value, dict):
        items = [f"{json.dumps(key)} = {_toml(item, False)}" for key, item in value.items()]
        return "\n".join(items) if top else f"{{ {', '.join(items)} }}"
    if isinstance(value, list):
        return f"[{', '.join(_toml(item, False) for item in value)}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(str(value) if value is None else value)


ARGUMENTS = shlex.split("""
    ask eval bench board demo doctor lens methods --help --version PICTURE CUT FOLDER RESULTS --model pocket-llava
    nobody/nothing --method norm norm+idpruner all dense --keep 1/4 64t 1/2+64t 1 --option importance=norm seed=1
    mmr_lambda=[ --task pocketvqa/basic pope:FOLDER mmbench:CUT lmms:x --out rows.jsonl OUT rows.csv --overlay
    --device cpu gpu --dtype float32 int8 --json --layer --calibration --topk --max-new-tokens 0 -1 --batch --size
    1008x1008 0x0 --text --new-tokens --concurrency --compile graph --seconds nan inf --target-ttft 150ms --plot
    p.png --split val --count --per-kind --seed --workers --no-costs --paper idpruner --table --diff --advise 0.02
    --partial --host --port 99999 --auth a:b : --results --video-backend av --share
    'what ?'
""")
_arguments = st.lists(st.one_of(st.sampled_from(ARGUMENTS), _words, scalars.map(str)), max_size=8)
_commands = st.sampled_from(("ask", "eval", "bench", "board", "demo", "doctor", "lens", "methods"))


@cache
def _sources(kind: str) -> dict[str, bytes]:
    """The files of a sound task, by their place in its folder."""
    with tempfile.TemporaryDirectory() as made:
        MAKERS[kind](Path(made))
        files = sorted(file for file in Path(made).rglob("*") if file.is_file())
        return {str(file.relative_to(made)): file.read_bytes() for file in files}


@st.composite
def _tasks(draw: st.DrawFn, kind: str) -> dict[str, bytes]:
    files = dict(_sources(kind))
    written = [name for name in files if not name.endswith((".png", ".jpg"))]
    name = draw(st.sampled_from(written if draw(st.integers(0, 5)) else list(files)))
    if not name.endswith(".json"):
        files[name] = draw(blobs(files[name]))
    elif kind == "pope":
        rows = [json.loads(line) for line in files[name].decode().splitlines()]
        changed = [draw(documents(row)) if draw(st.booleans()) else json.dumps(row) for row in rows[:3]]
        files[name] = "\n".join(changed).encode()
    else:
        files[name] = draw(documents(json.loads(files[name]))).encode("utf-8", "surrogatepass")
    return files


RESULT = {"type": "run", "model": "m", "task": "t", "methods": ["dense"], "version": "1"}
ANSWER = {"type": "answer", "task": "t", "id": "1", "kind": "all", "method": "dense", "keep": "1", "score": 1.0}


# -- targets ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _file(data: bytes | str, name: str) -> Iterator[Path]:
    path = _folder() / name
    path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _config(text: str) -> None:
    with _file(text, "vtprune.json") as path:
        config = vtprune.PruneConfig.load(path)
    assert vtprune.PruneConfig.from_json(config.to_json()).label == config.label
    config.pruner()
    config.budget()


def _method(payload: tuple[str, str, list[str]]) -> None:
    spec, keep, options = payload
    with contextlib.suppress(VTPruneError):
        config_of(spec.split(" ")[0], keep, options)
    with contextlib.suppress(VTPruneError):
        parse_keep(keep)
    runner.combinations([spec], [keep])


def _calibration(text: str) -> None:
    with _file(text, "embedlens.json") as path:
        rule = Calibration.load(path)
    assert Calibration.from_dict(json.loads(rule.to_json())).classes == rule.classes
    rule.check(rule.vocabulary, rule.width)


def _lens_page(text: str) -> None:
    seen = Lens.from_json(text)
    list(seen.records())
    seen.to_json()


def _task(payload: tuple[str, dict[str, bytes]]) -> None:
    kind, files = payload
    folder = Path(tempfile.mkdtemp(dir=_folder()))  # tasks are remembered by their folder
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    try:
        for example in get(f"{kind}:{folder}").examples("test", 5, 0):
            assert isinstance(example.id, str) and isinstance(example.answer, str) and isinstance(example.kind, str)
            assert all(isinstance(answer, str) for answer in example.answers)
            runner.metrics.score("x", example)
    finally:
        shutil.rmtree(folder)


def _paper(text: str) -> None:
    with _file(text, "claims.toml") as path:
        list(papers.lines(papers.load(str(path))))


def _picture(data: bytes) -> None:
    with _file(data, "picture") as path:
        for read in (open_image, guard.picture):
            with contextlib.suppress(VTPruneError):
                read(path)


def _clip(data: bytes) -> None:
    with _file(data, "clip") as path:
        video.read(path, frames=4, max_seconds=60, max_pixels=1 << 20, backend="av")


def _scorer(data: bytes) -> None:
    with _file(data, "scorer.safetensors") as path:
        load_scorer(str(path))


def _results(lines: str) -> None:
    with _file(lines, "rows.jsonl") as path:
        table.read(path)


def _command(arguments: list[str]) -> None:
    """The command line up to where a model would be loaded, a server started, or a speed measured."""
    folder = _folder() / "command"
    if not folder.is_dir():
        folder.mkdir()
        (folder / "PICTURE").write_bytes(_pictures()[0])
        (folder / "CUT").write_bytes(_pictures()[0][:60])
        (folder / "FOLDER").mkdir()
        (folder / "RESULTS").mkdir()

    def place(argument: str) -> str:
        for name in ("PICTURE", "CUT", "FOLDER", "RESULTS", "OUT", "rows.jsonl", "rows.csv", "p.png"):
            argument = argument.replace(name, str(folder / name))
        return argument

    def stop(*_: Any, **__: Any) -> Any:
        raise ConfigError("this is as far as it goes")

    said, out = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for name in ("vtprune.load", "vtprune.cli.common.load", "vtprune.bench.build", "vtprune.demo.studio.Studio",
                     "vtprune.eval.evaluate", "vtprune.eval.sweep.sweep", "vtprune.doctor.bare"):  # fmt: skip
            stack.enter_context(mock.patch(name, stop))
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.redirect_stdout(out))
        code = cli.main([place(argument) for argument in arguments])
    assert code in (0, 1, 2, 130), code
    if code == 2:
        errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and len(errors[0]) > len("error: "), said.getvalue()
    assert "Traceback" not in said.getvalue()


TARGETS: dict[str, tuple[Callable[[Any], None], Callable[[], st.SearchStrategy[Any]]]] = {
    "config": (_config, lambda: documents(*CONFIGS)),
    "method": (_method, lambda: st.tuples(texts(*SPECS), texts(*KEEPS), st.lists(texts("seed=1"), max_size=2))),
    "calibration": (_calibration, lambda: documents(CALIBRATION)),
    "lens": (_lens_page, lambda: documents(_lens())),
    "task": (_task, lambda: st.sampled_from(sorted(MAKERS)).flatmap(lambda x: st.tuples(st.just(x), _tasks(x)))),
    "paper": (_paper, lambda: st.one_of(texts(PAPER), documents(CLAIMS, cut=False).map(json.loads).map(_toml))),
    "picture": (_picture, lambda: blobs(*_pictures())),
    "clip": (_clip, lambda: blobs(*_clips())),
    "scorer": (_scorer, lambda: blobs(*_scorers())),
    "results": (_results, lambda: st.lists(documents(RESULT, ANSWER), max_size=4).map("\n".join)),
    "command": (_command, lambda: st.tuples(_commands, _arguments).map(lambda x: [x[0], *x[1]])),
}  # fmt: skip


def cases() -> st.SearchStrategy[Case]:
    return st.sampled_from(sorted(TARGETS)).flatmap(
        lambda target: st.builds(Case, st.just(target), TARGETS[target][1]())
    )


def _hangs(*_: Any) -> None:
    raise AssertionError(f"more than {SECONDS} s")


def run(case: Case) -> str:
    """``"refused"`` with one line of ours, or ``"read"``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[case.target][0](case.payload)
        return "read"
    except VTPruneError as error:
        assert str(error).strip() and len(str(error).splitlines()) == 1, f"not one line: {error}"
        return "refused"


def check(case: Case) -> str:
    """`run`, and it must come to an end."""
    before = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(SECONDS)
    try:
        return run(case)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
