# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, what it writes, and that every mistake is one line with exit code 2."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from helpers import Declared
from PIL import Image

import vtprune
from vtprune import cli, models, registry
from vtprune.models.loading import build_inputs

WORDS = ("what", "does", "the", "text", "say", "?", "USER:", "ASSISTANT:")
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}PICTURE {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def tokenizer(names: dict[int, str]) -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer that fits the vocabulary of the tiny models."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {tiny.PAD: "<pad>", tiny.BOS: "<s>", 2: "<unk>"} | names
    vocabulary = {names.get(i, f"w{i}"): i for i in range(tiny.VOCABULARY)}
    for i, word in enumerate(WORDS):
        vocabulary[word] = vocabulary.pop(f"w{20 + i}")
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [name for i, name in names.items() if i > 2]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=special
    )


def save_llava(folder: Path) -> None:
    """A tiny LLaVA with a processor that has no chat template."""
    tiny.build("llava").save_pretrained(folder)
    side = {"height": tiny.CROP, "width": tiny.CROP}
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": tiny.CROP}, crop_size=side),
        tokenizer({tiny.IMAGE: "<image>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(folder)


def save_qwen(folder: Path) -> None:
    """A tiny Qwen2.5-VL with a chat template."""
    tiny.build("qwen2_5_vl").save_pretrained(folder)
    names = {tiny.IMAGE: "<|image_pad|>", tiny.VIDEO: "<|video_pad|>"}
    names |= {tiny.VISION_START: "<|vision_start|>", tiny.VISION_END: "<|vision_end|>"}
    size = {"min_pixels": 28 * 28, "max_pixels": 112 * 112}
    transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**size),
        tokenizer(names),
        transformers.Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE.replace("PICTURE", "<|vision_start|> <|image_pad|> <|vision_end|>"),
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_llava(folder / "llava")
    save_qwen(folder / "qwen")
    return {name: folder / name for name in ("llava", "qwen")}


@pytest.fixture
def picture(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def ask(*arguments: str | Path) -> int:
    return cli.main(["ask", *map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_ask_json(
    family: str, checkpoints: dict[str, Path], picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "kept.png"
    limits = ["--max-new-tokens", "3", "--keep", "1/4", "--option", "mmr_lambda=0.7", "--json", "--overlay", png]
    assert ask(picture, "what does the text say ?", "--model", checkpoints[family], *limits) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    result = json.loads(printed.out)
    dense, pruned = result["dense"], result["pruned"]
    # LLaVA cuts out 56 x 56 pixels, 4 x 4 patches; Qwen rounds 90 x 60 to 84 x 56 pixels, 3 x 2 merged patches.
    total = {"llava": 16, "qwen": 6}[family]
    assert (dense["visual_tokens"], pruned["visual_tokens"]) == (total, max(1, total // 4))
    assert dense["prefill_ms"] > 0 and pruned["prefill_ms"] > 0 and dense["total_ms"] > 0
    assert pruned["prefill_flops"] < dense["prefill_flops"]
    assert result["options"] == {"mmr_lambda": 0.7} and result["method"] == "idpruner" and result["keep"] == "1/4"
    assert Image.open(png).width == 720


def test_ask_with_methods_in_a_row(
    checkpoints: dict[str, Path], picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = vtprune.load(str(checkpoints["llava"]), device="cpu")
    inputs = build_inputs(model, processor, Image.open(picture), "what ?")
    arguments = [picture, "what ?", "--model", checkpoints["llava"], "--max-new-tokens", "4", "--json"]
    for keep, numbers in (("1/4", 0.25), ("1/2+3t", (0.5, 3))):
        row = ["--method", "norm+idpruner", "--keep", keep, "--option", "mmr_lambda=0.7"]
        assert ask(*arguments, *row) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["method"] == "norm+idpruner" and result["keep"] == keep
        assert result["pruned"]["visual_tokens"] == {"1/4": 4, "1/2+3t": 3}[keep]
        with vtprune.apply(model, ["norm", "idpruner"], keep=numbers, mmr_lambda=0.7):
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        text = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        assert result["pruned"]["answer"] == text.strip()


def test_ask_prints_a_table(
    checkpoints: dict[str, Path], picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "kept.png"
    arguments = ["--model", checkpoints["llava"], "--method", "norm", "--keep", "4t", "--max-new-tokens", "2"]
    assert ask(picture, "what ?", *arguments, "--overlay", png) == 0
    printed = capsys.readouterr()
    for column in ("answer", "visual tokens", "prefill ms", "total ms"):
        assert column in printed.out
    assert re.search(r"^dense .* 16 +[\d.]+ +[\d.]+ +[\d.]+$", printed.out, re.MULTILINE)
    assert re.search(r"^pruned .* 4 +[\d.]+ +[\d.]+ +[\d.]+$", printed.out, re.MULTILINE)
    assert "kept patches" in printed.out and png.is_file()
    assert max(map(len, printed.out.splitlines())) <= 80 + len(str(png))
    assert printed.err == ""


def test_ask_answers_like_the_library(
    checkpoints: dict[str, Path], picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "what does the text say ?"
    assert ask(picture, question, "--model", checkpoints["qwen"], "--max-new-tokens", "5", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    model, processor = vtprune.load(str(checkpoints["qwen"]), device="cpu")
    inputs = build_inputs(model, processor, Image.open(picture), question)
    start = inputs["input_ids"].shape[1]

    def answer() -> str:
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        return processor.batch_decode(output[:, start:], skip_special_tokens=True)[0].strip()

    assert result["dense"]["answer"] == answer()
    with vtprune.apply(model, "idpruner", keep=0.25):
        assert result["pruned"]["answer"] == answer()


def test_prompt_without_a_chat_template(checkpoints: dict[str, Path], picture: str) -> None:
    model, processor = vtprune.load(str(checkpoints["llava"]), device="cpu")
    inputs = build_inputs(model, processor, Image.open(picture), "what ?")
    text = processor.batch_decode(inputs["input_ids"])[0]
    assert text.split() == ["USER:", *["<image>"] * 16, "what", "?", "ASSISTANT:"]


def test_ask_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = Path(__file__).parents[1] / "examples" / "text.png"
    png = tmp_path / "kept.png"
    assert ask(picture, "what does the text say ?", "--overlay", png, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dense"]["visual_tokens"] == 576 and result["pruned"]["visual_tokens"] == 144
    assert result["dense"]["answer"].replace(" ", "") == "NPZ"
    assert png.is_file()


def printed_methods(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["methods", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def columns_of_families() -> list[list[str]]:
    """Families with the same answer for every method share a column."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for kind in models.served(vtprune.methods()["norm"]):
        columns.setdefault(tuple(models.served(cls)[kind] for cls in vtprune.methods().values()), []).append(kind)
    return list(columns.values())


@pytest.mark.parametrize("columns", [80, 120])
def test_methods(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = printed_methods(capsys)
    assert max(map(len, out.splitlines())) <= columns
    declared, served, legend = re.split(r"\n\s*\n", out.strip())
    for name, cls in vtprune.methods().items():
        row = re.search(rf"^{re.escape(name)} .*$", declared, re.MULTILINE)[0].split()
        assert row[1].rstrip(",") == (*cls.mechanism, "none")[0]
        flags = ["yes" if flag else "no" for flag in (cls.query_aware, cls.training_free, cls.adaptive)]
        assert row[-4:] == [*flags, cls.paper]
        row = re.search(rf"^{re.escape(name)} .*$", served, re.MULTILINE)[0].split()
        answers = models.served(cls)
        assert row[1:] == ["image,", "video", *(answers[kinds[0]] for kinds in columns_of_families())]
        assert all(answers[kind] == answers[kinds[0]] for kinds in columns_of_families() for kind in kinds)
    head = served.split("\n" + min(vtprune.methods()))[0].split()
    assert sorted(head) == sorted(["method", "modality", *tiny.FAMILIES, *tiny.MORE])
    assert legend.startswith("yes: ") and "stand-in: " in legend and "untested" not in legend


def test_methods_of_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = printed_methods(capsys, "zoo")
    assert out.startswith("zoo  ZOO-Prune: ") and "grid" not in out and max(map(len, out.splitlines())) <= 80
    assert re.search(r"^h +0\.01 +Step \(\"fd\" and \"fd_fused\"\)\.", out, re.MULTILINE)
    assert "It has no options." in printed_methods(capsys, "norm")


def test_methods_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed_methods(capsys, "--json"))
    assert list(found) == list(vtprune.methods())
    for name, cls in vtprune.methods().items():
        assert found[name]["families"] == models.served(cls) and found[name]["about"]
        assert found[name]["modality"] == list(cls.modality) and found[name]["mechanism"] == list(cls.mechanism)
        options = {field.name: field.default for field in dataclasses.fields(cls)}
        assert {option: facts["default"] for option, facts in found[name]["options"].items()} == options
        assert all(facts["about"] for facts in found[name]["options"].values()), name
    assert json.loads(printed_methods(capsys, "idpruner", "--json")) == {"idpruner": found["idpruner"]}


def test_methods_of_another_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Not tested here, with an option that has no default, one that has one for each, and no docstring of its own."""

    @dataclasses.dataclass
    class Far(Declared):
        path: Path
        steps: list[int] = dataclasses.field(default_factory=lambda: [1, 2])

    Far.__doc__ = None
    monkeypatch.setattr(registry, "_METHODS", registry.methods())
    registry.register("far")(Far)
    out = printed_methods(capsys, "far")
    assert re.search(r"^path +required", out, re.MULTILINE) and re.search(r"^steps +\[1, 2\]", out, re.MULTILINE)
    assert re.search(r"^far +image, video +untested\s*$", out, re.MULTILINE) and "untested: " in out


def test_methods_does_not_know_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "idprune"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: unknown method 'idprune' (did you mean 'idpruner'?)")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vtprune {vtprune.__version__}\n"


def test_no_arguments_print_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    alone = capsys.readouterr()
    assert alone.err == "" and "doctor" in alone.out and "--version" in alone.out
    monkeypatch.setattr(sys, "argv", ["vtprune"])
    assert cli.main() == 0
    assert "doctor" in capsys.readouterr().out
    line = next(line for line in alone.out.splitlines() if "--version" in line)
    assert "bool" not in line.lower() and "Print the version" in line


@pytest.mark.parametrize("command", cli.EXAMPLES)
def test_a_missing_argument_is_told_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: Missing argument") and printed.err.count("\n") == 1
    assert f"For example: vtprune {command} " in printed.err
    assert cli.main([command, "--no-such-flag"]) == 2 and "For example" not in capsys.readouterr().err


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "vtprune", "ask"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


MISTAKES = {
    "no question": (["PICTURE"], "question"),
    "empty question": (["PICTURE", "  "], "question is empty"),
    "no image": (["missing.png", "what ?"], "no image missing.png"),
    "folder as image": (["FOLDER", "what ?"], "is a folder"),
    "text as image": (["TEXT", "what ?"], "not a picture"),
    "cut image": (["CUT", "what ?"], "cannot read the image"),
    "unknown method": (["PICTURE", "what ?", "--method", "idprune"], "did you mean 'idpruner'"),
    "unknown method in a row": (["PICTURE", "what ?", "--method", "norm+idprune"], "did you mean 'idpruner'"),
    "a count before the end": (
        ["PICTURE", "what ?", "--method", "norm+idpruner", "--keep", "64t+1/2"],
        "a count belongs to the last method",
    ),
    "three budgets for two": (
        ["PICTURE", "what ?", "--method", "norm+idpruner", "--keep", "1/2+1/2+64t"],
        "3 numbers for 2 methods",
    ),
    "two budgets for one": (["PICTURE", "what ?", "--method", "norm", "--keep", "1/2+64t"], "keep="),
    "option of none of them": (
        ["PICTURE", "what ?", "--method", "norm+idpruner", "--option", "sed=1"],
        "none of the methods norm, idpruner",
    ),
    "bare one": (["PICTURE", "what ?", "--keep", "1"], "1.0 for all"),
    "keep of words": (["PICTURE", "what ?", "--keep", "half"], "not a budget"),
    "keep nothing": (["PICTURE", "what ?", "--keep", "0%"], "(0, 1]"),
    "keep too much": (["PICTURE", "what ?", "--keep", "1.5"], "(0, 1]"),
    "option without value": (["PICTURE", "what ?", "--option", "seed"], "key=value"),
    "unknown option": (["PICTURE", "what ?", "--method", "random", "--option", "sed=1"], "did you mean 'seed'"),
    "bad option value": (["PICTURE", "what ?", "--option", "mmr_lambda=7"], "mmr_lambda=7"),
    "unknown device": (["PICTURE", "what ?", "--device", "gpu"], "--device gpu"),
    "unknown dtype": (["PICTURE", "what ?", "--dtype", "int8"], "--dtype int8"),
    "no new tokens": (["PICTURE", "what ?", "--max-new-tokens", "0"], "--max-new-tokens"),
    "overlay nowhere": (["PICTURE", "what ?", "--overlay", "no/such/folder.png"], "does not exist"),
    "unknown flag": (["PICTURE", "what ?", "--kep", "1/4"], "--kep"),
    "unknown hub name": (["PICTURE", "what ?", "--model", "nobody/nothing"], "nobody/nothing"),
    "unknown model": (["PICTURE", "what ?", "--model", "pocket-lava"], "pocket-lava"),
    "folder without a model": (["PICTURE", "what ?", "--model", "FOLDER"], "config.json"),
    "model without vision": (["PICTURE", "what ?", "--model", "BLIND"], "without vision"),
    "corrupt weights": (["PICTURE", "what ?", "--model", "CORRUPT"], "cannot load"),
    "corrupt config": (["PICTURE", "what ?", "--model", "GARBLED"], "cannot load"),
}


@pytest.fixture(scope="module")
def traps(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files and folders that cannot be used, by the names that MISTAKES gives them."""
    folder = tmp_path_factory.mktemp("traps")
    made = {name: folder / name.lower() for name in ("FOLDER", "TEXT", "CUT", "PICTURE", "BLIND", "CORRUPT", "GARBLED")}
    made["FOLDER"].mkdir()
    made["TEXT"].write_text("this is not a picture")
    Image.new("RGB", (64, 64)).save(made["PICTURE"], format="PNG")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(made["CUT"], format="PNG")
    made["CUT"].write_bytes(made["CUT"].read_bytes()[:500])
    text = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(text).save_pretrained(made["BLIND"])
    for name in ("CORRUPT", "GARBLED"):
        shutil.copytree(checkpoints["llava"], made[name])
    (made["CORRUPT"] / "model.safetensors").write_bytes(b"\x00" * 100)
    (made["GARBLED"] / "config.json").write_text("{")
    return {name: str(path) for name, path in made.items()}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, traps: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = MISTAKES[name]
    code = cli.main(["ask", *(traps.get(argument, argument) for argument in arguments)])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert expected in printed.err
    assert "Traceback" not in printed.err


def test_a_mistake_in_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch, picture: str) -> None:
    monkeypatch.setattr(cli.common, "load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(picture, "what ?")


def test_all_tokens_kept_is_bit_identical(
    checkpoints: dict[str, Path], picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", checkpoints["llava"], "--keep", "999t", "--max-new-tokens", "4", "--json"]
    assert ask(picture, "what ?", *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dense"]["answer"] == result["pruned"]["answer"]
    assert result["pruned"]["visual_tokens"] == 16
    assert any("999" in note for note in result["notes"])


def test_the_picture_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (80, 40)).save(path, exif=exif)
    assert cli.common.open_image(path).size == (40, 80)


def test_timing_counts_milliseconds() -> None:
    import time

    from vtprune.eval.cost import Clock

    clock = Clock(torch.device("cpu"))
    clock.put(None)  # the prompt
    time.sleep(0.02)
    clock.put(None)  # the first new token
    time.sleep(0.02)
    clock.put(None)
    assert 20 <= clock.first_token_ms < clock.elapsed_ms() < 2000
    assert clock.elapsed_ms() >= 40


def test_eval_writes_rows_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "rows.jsonl", tmp_path / "table.csv"
    chosen = ["--method", "dense", "--method", "norm", "--keep", "1/9", "--count", "6", "--batch", "6"]
    arguments = ["eval", "pocketvqa/basic", "--out", str(out), "--table", str(table), *chosen, "--device", "cpu"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| norm | 1/9 | 64 |" in printed and "Loading" not in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(row["type"] == "answer" for row in rows) == 12
    assert "norm" in table.read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["nothing"], "unknown task 'nothing'"), (["pocketvqa/basic", "--method", "nomr"], "nomr")],
)
def test_eval_refuses_before_anything_is_loaded(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def look(*arguments: str | Path) -> int:
    return cli.main(["lens", *map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_lens_draws_a_picture_and_a_page(
    family: str, checkpoints: dict[str, Path], picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png, page = tmp_path / "lens.png", tmp_path / "lens.html"
    assert look(picture, "--model", checkpoints[family], "--out", png, "--layer", 2) == 0
    out = capsys.readouterr().out
    assert "visual tokens" in out and "not classified: there is no calibration" in out
    with Image.open(png) as drawn:
        assert drawn.format == "PNG" and drawn.width >= 400
    rule = {"checkpoint": "tiny", "vocabulary": tiny.VOCABULARY, "width": 32, "anchors": {"dead": [40, 41, 42]}}
    (tmp_path / "mine.json").write_text(json.dumps(rule))
    chosen = ("--calibration", tmp_path / "mine.json")
    assert look(picture, "--model", checkpoints[family], "--out", page, "--topk", 4, *chosen) == 0
    assert "dead" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["layers"] == list(range(tiny.LAYERS + 1)) and data["layer"] == tiny.LAYERS
    assert len(data["panels"][0]["tokens"][0]["words"][0]) == 4 and "picture.png" in text


def test_lens_mistakes_are_one_line(
    checkpoints: dict[str, Path], picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--model", checkpoints["llava"])
    for arguments, said in (
        ((picture, "--out", tmp_path / "lens.gif"), ".png or .html"),
        ((picture, "--out", tmp_path / "no" / "lens.png"), "does not exist"),
        (("nothing.png", *model), "no image"),
        ((picture, "--out", tmp_path / "x.png", "--layer", 9, *model), "layer 9 is not there"),
        ((picture, "--out", tmp_path / "x.html", "--layer", 9, *model), "layer 9 is not there"),
        ((picture, "--calibration", tmp_path / "none.json", *model), "cannot read the calibration"),
    ):
        assert look(*arguments) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error, error
