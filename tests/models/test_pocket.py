# SPDX-License-Identifier: Apache-2.0
"""The pocket models as they ship: the folders load cleanly, answer, and are what export writes from a state."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.errors import ConfigError
from vtprune.models import loading
from vtprune.models.pocket import batch, card, data, export, layout, qwen, score, train, vocab, worlds
from vtprune.models.pocket import next as anyres
from vtprune.models.pocket.families import FAMILIES
from vtprune.models.pocket.model import LOG_FILE, PIXEL_MEAN, PIXEL_STD, STATE_FILE

FOLDER = export.HERE / "pocket-llava"
SHIPPED = loading.embedded_models()
SMALL_FILES = {
    "pocket-llava": layout.small_files,
    "pocket-llava-next": anyres.small_files,
    "pocket-qwen2.5-vl": qwen.small_files,
}
WIDTHS = {"vision_width": 32, "vision_layers": 2, "vision_heads": 2, "width": 32, "layers": 2, "heads": 2, "ffn": 64}
TINY = {name: dict(WIDTHS) for name in export.MODELS}
TINY["pocket-qwen2.5-vl"] |= {"vision_ffn": 48, "full_attention": (1,)}


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request) -> tuple[str, Any, dict[str, Any]]:
    model, info = AutoModelForImageTextToText.from_pretrained(
        export.HERE / request.param, dtype=torch.float32, output_loading_info=True
    )
    return request.param, model.eval(), info


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(FOLDER)


def golden(name: str) -> dict[str, Any]:
    return json.loads((export.HERE / name / export.GOLDEN_FILE).read_text())


def prompt(processor: Any, text: str) -> str:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)


def test_every_weight_is_read(shipped):
    name, model, info = shipped
    assert type(model).__name__ == card.MODELS[name].architecture
    assert not any(info.values()), info


def test_golden_logits(shipped):
    name, model, _ = shipped
    logits, expected = export.golden_logits(name, model), golden(name)["logits"]
    assert logits.keys() == expected.keys()
    assert max(abs(logits[color] - expected[color]) for color in logits) <= 1e-4


@pytest.mark.parametrize("name", SHIPPED)
def test_weight_file(name):
    file = export.HERE / name / layout.WEIGHTS_FILE
    assert export.sha256(file) == golden(name)["sha256"]
    assert file.stat().st_size <= layout.MAX_BYTES
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
        assert {str(opened.get_slice(name).get_dtype()) for name in names} == {"BF16"}
    assert "lm_head.weight" not in names  # tied, so stored once
    assert not any(name.startswith(("heads.", "model.language_model", "model.vision")) for name in names)


def test_all_weights_together_are_small():
    assert sum((export.HERE / name / layout.WEIGHTS_FILE).stat().st_size for name in SHIPPED) <= 46 * 2**20


@pytest.mark.parametrize("name", SHIPPED)
def test_folder_is_what_export_writes(name):
    folder, config = export.HERE / name, export.MODELS[name].config()
    for file, content in SMALL_FILES[name](config).items():
        assert json.loads((folder / file).read_text()) == content, file
    template = qwen.CHAT_TEMPLATE if name == "pocket-qwen2.5-vl" else layout.CHAT_TEMPLATE
    assert (folder / "chat_template.jinja").read_text() == template
    saved = json.loads((folder / "tokenizer.json").read_text())
    assert saved["model"]["vocab"] == vocab.IDS


def test_model_card_follows_from_the_log(shipped):
    name, model, _ = shipped
    folder = export.HERE / name
    log = export.read_log(folder / LOG_FILE)
    parameters = sum(p.numel() for p in model.parameters())
    size = (folder / layout.WEIGHTS_FILE).stat().st_size
    assert (folder / "README.md").read_text() == card.model_card(name, log, parameters, size)


def test_a_folder_is_scored_and_its_card_says_so(tmp_path, monkeypatch):
    """The shipped weights on a few questions, by the code that scores a training run."""
    name, folder = "pocket-llava", tmp_path / "pocket-llava"
    shutil.copytree(export.HERE / name, folder)
    row = score.score(name, folder, ("basic",), 12, "cpu")
    assert row["basic/mean"] >= 0.9 and row["event"] == "test" and row["questions"] == 12
    assert {key for key in row if "/" in key} == {f"basic/{k}" for k in ("mean", *data.KINDS)}
    with pytest.raises(ValueError, match="'video'"):
        score.score(name, folder, ("video",), 6, "cpu")
    with pytest.raises(ValueError, match="no weights"):
        score.score(name, tmp_path, ("basic",), 6, "cpu")
    with pytest.raises(ValueError, match="easy-vqa are missing"):
        score.write(name, row, folder)
    monkeypatch.setitem(train.EXAMS, name, ("basic",))
    before = (folder / "README.md").read_text()
    score.write(name, row, folder)
    log, text = export.read_log(folder / LOG_FILE), (folder / "README.md").read_text()
    assert log[-1] == row and sum(r.get("event") == "test" for r in log) == 1 and card.is_finished(log)
    assert f"pocket.score {name}`" in text and row["weights"][:12] in text and "to 12 test questions" in text
    assert f"pocket.score {name}`" not in before
    with pytest.raises(ValueError, match="other weights"):
        score.write(name, {**row, "weights": "0"}, folder)

    weights = load_file(folder / layout.WEIGHTS_FILE)
    save_file({key: w * (0 if "embed" in key else 1) for key, w in weights.items()}, folder / layout.WEIGHTS_FILE)
    blind = score.score(name, folder, ("basic",), 6, "cpu")
    assert blind["basic/mean"] < 0.5 and blind["weights"] != row["weights"]


@pytest.mark.parametrize(
    "text", ["what color is the circle ?", "What color is the circle?", "WHAT COLOR is the circle?"]
)
def test_prompts_are_what_the_model_was_trained_on(processor, text):
    scene = data.scene("test", 0)
    inputs = processor(images=data.render(scene), text=prompt(processor, text), return_tensors="pt")
    expected = [vocab.BOS, *[vocab.IMAGE] * 576, *vocab.encode("what color is the circle ?")]
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["attention_mask"].all()
    renderer, arrays = batch.Renderer("cpu"), batch.picture_arrays([scene])
    clean = (renderer.pixels(arrays, renderer.coverage(arrays), None) - PIXEL_MEAN) / PIXEL_STD
    difference = inputs["pixel_values"] - clean
    assert abs(difference.std() - data.NOISE / PIXEL_STD) < 0.01
    assert abs(difference.mean()) < 0.01


def test_conversations_are_what_the_model_was_trained_on(processor):
    questions = [q for q in data.questions(data.scene("test", 0)) if q.kind != "ocr"]
    messages = []
    for question in questions:
        messages.append({"role": "user", "content": [{"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    messages[0]["content"].insert(0, {"type": "image"})
    ids = processor.tokenizer(processor.apply_chat_template(messages, tokenize=False))["input_ids"]
    row = batch.text_arrays([questions], [True], 577, 79)["ids"][0]
    assert ids[:2] == [vocab.BOS, vocab.IMAGE]
    assert ids[2:] == row[row != vocab.PAD].tolist()


def test_answers_are_joined_to_words(processor):
    def decode(tokens: str) -> str:
        return processor.decode([vocab.IDS[token] for token in tokens.split()], skip_special_tokens=True)

    assert decode("##K ##7 ##P </s>") == "K7P"
    assert decode("top left </s>") == "top left"
    assert decode("7 </s>") == "7"


def test_unknown_words_and_padding(processor):
    assert processor.tokenizer("qwerty")["input_ids"] == [vocab.UNK]
    ids = processor.tokenizer(["is there", "is"], padding=True)["input_ids"]
    assert ids[1] == [vocab.PAD, vocab.IDS["is"]]


def test_pictures_that_are_not_square_are_squeezed(processor):
    picture = data.render(data.scene("test", 0)).resize((500, 300))
    inputs = processor(images=picture, text=prompt(processor, "how many objects are there ?"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)
    assert (inputs["input_ids"] == vocab.IMAGE).sum() == 576


@torch.no_grad()
def test_it_answers(model, processor):
    pairs = list(data.exam("test", 24))
    right = dict.fromkeys(data.KINDS, 0)
    for start in range(0, len(pairs), 12):
        part = pairs[start : start + 12]
        texts = [prompt(processor, question.text) for _, question in part]
        inputs = processor(
            images=[data.render(scene) for scene, _ in part], text=texts, padding=True, return_tensors="pt"
        )
        output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(output, skip_special_tokens=True)
        for (_, question), given in zip(part, answers, strict=True):
            right[question.kind] += given == question.answer
    # Measured on 2,000 questions: .985, and at worst .934 for one kind.
    assert sum(right.values()) >= 21, right
    assert min(right.values()) >= 2, right


def asked(processor: Any, dialogue: worlds.Dialogue) -> Any:
    """Stock inputs for a dialogue: its pictures as PocketVQA draws them, its demonstrations with their answers."""
    pictures, messages, last = [], [], dialogue.turns[-1]
    for turn in dialogue.turns:
        drawn = [data.render(scene) for scene in turn.pictures]
        pictures += drawn
        marks = [{"type": "video"}] if turn.clip else [{"type": "image"}] * len(drawn)
        messages.append({"role": "user", "content": [*marks, {"type": "text", "text": turn.question.text}]})
        if turn is not last:
            answer = [{"type": "text", "text": turn.question.answer}]
            messages.append({"role": "assistant", "content": answer})
    given: dict[str, Any] = {"images": pictures}
    if last.clip:
        clip = np.stack([np.asarray(picture) for picture in pictures])
        given = {"videos": [clip], "video_metadata": qwen.video_metadata([len(clip)])}
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return processor(**given, text=[text], return_tensors="pt")


@torch.no_grad()
def test_every_world_is_answered_as_the_card_says(shipped):
    name, model, _ = shipped
    processor = AutoProcessor.from_pretrained(export.HERE / name)
    log = export.read_log(export.HERE / name / LOG_FILE)
    scored = [row for row in log if row.get("event") in ("val", "test") and "keep" not in row][-1]
    for world in card.MODELS[name].worlds:
        if world in ("basic", "easy-vqa") or f"{world}/mean" not in scored:
            continue
        dialogues = list(worlds.exam(world, "val", 6))
        right = 0
        for dialogue in dialogues:
            inputs = asked(processor, dialogue)
            output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            right += processor.batch_decode(output, skip_special_tokens=True) == [dialogue.answer]
        # Three standard deviations of six draws: little is asked, but a prompt that was put together wrongly fails.
        score = scored[f"{world}/mean"]
        assert right >= 6 * score - 3 * (6 * score * (1 - score)) ** 0.5, (world, right, score)


@torch.no_grad()
def test_cls_attention_lands_on_objects(model):
    eager = AutoModelForImageTextToText.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager"
    ).model.vision_tower
    scenes = [data.scene("test", index) for index in range(8)]
    renderer, arrays = batch.Renderer("cpu"), batch.picture_arrays(scenes)
    coverage = renderer.coverage(arrays)
    pixels = (renderer.pixels(arrays, coverage, torch.Generator().manual_seed(0)) - PIXEL_MEAN) / PIXEL_STD
    kind = batch.patch_targets(arrays, coverage)["kind"]
    attention = eager(pixel_values=pixels, output_attentions=True).attentions[-2][:, :, 0, 1:].mean(1)
    mass = (attention * (kind > 0)).sum() / attention.sum()
    assert mass > 2 * (kind > 0).float().mean()


@pytest.mark.parametrize("name", SHIPPED)
def test_load_knows_every_shipped_model(name):
    model, processor = vtprune.load(name, device="cpu")
    assert type(model).__name__ == card.MODELS[name].architecture
    assert not model.training
    assert processor.tokenizer.model_max_length == model.config.text_config.max_position_embeddings


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """A copy of pocket-llava that counts as shipped."""
    shutil.copytree(FOLDER, tmp_path / "pocket-llava")
    monkeypatch.setattr(loading, "EMBEDDED", tmp_path)
    return tmp_path / "pocket-llava"


def test_truncated_weights_are_refused(copied):
    vtprune.load("pocket-llava", device="cpu")
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError) as caught:
        vtprune.load("pocket-llava", device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(file), "truncated or changed", export.sha256(file), golden("pocket-llava")["sha256"], "reinstall"):
        assert part in message


def test_changed_weights_are_refused_unless_the_path_is_given(copied):
    file = copied / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="truncated or changed"):
        vtprune.load("pocket-llava", device="cpu")
    vtprune.load(copied, device="cpu")


@pytest.mark.parametrize("missing", ["golden.json", "model.safetensors"])
def test_missing_files_are_named(copied, missing):
    (copied / missing).unlink()
    with pytest.raises(ConfigError, match=rf"pocket-llava has no file .*{missing}; reinstall vtprune"):
        vtprune.load("pocket-llava", device="cpu")


START = {"gpu": "some GPU", "torch": "2", "transformers": "5", "peak": 1e-3, "patch_weight": 0.3, "scene_weight": 0.1}
START |= {"event": "start", "step": 0, "check_questions": 240}


def rows(stage: str, steps: int, done: int, known: tuple[str, ...], score: float) -> list[dict[str, Any]]:
    """A log as the trainer writes it: of one run, with a validation halfway and at the end."""
    at = [step for step in (steps // 2, steps) if step <= done]
    return [
        {**START, "stage": stage, "steps": steps},
        {"stage": stage, "step": 100, "ce": 1.0, "aux": 0.5, "cls": 0.1, "ms": 50.0, "prompts": 6400, "seconds": 5.0},
        *({"event": "val", "stage": stage, "step": step, **{f"{w}/mean": score for w in known}} for step in at),
        {"event": "stop", "stage": stage, "step": done, "seconds": done / 20},
    ]


def state(name: str, folder: Path, log: list[dict[str, Any]]) -> Path:
    """A state of weights alone, of a network with random weights."""
    torch.manual_seed(0)
    weights = {f"weight/{n}": p.detach().bfloat16() for n, p in FAMILIES[name](**TINY[name]).model.named_parameters()}
    folder.mkdir()
    save_file(weights, folder / "state-0.safetensors")
    (folder / LOG_FILE).write_text("".join(json.dumps(row) + "\n" for row in log))
    last = [row for row in log if "step" in row][-1]
    (folder / STATE_FILE).write_text(json.dumps({"model": name, "stage": last["stage"], "step": last["step"]}))
    return folder


@pytest.fixture
def tiny(monkeypatch) -> None:
    """Export writes networks of these widths."""
    for name, model in list(export.MODELS.items()):
        monkeypatch.setitem(export.MODELS, name, replace(model, config=partial(model.config, **TINY[name])))


@pytest.mark.parametrize("name", export.MODELS)
def test_export(name, tmp_path, tiny):
    known = card.MODELS[name].worlds
    log = rows("basic", 2000, 2000, ("basic",), 0.5) + rows("full", 3000, 3000, known, 0.75)
    log.append({"event": "test", "questions": 2000, **{f"{w}/{k}": 0.875 for w in known for k in ("mean", "some")}})
    out = tmp_path / "out"
    export.export(name, state(name, tmp_path / "state", log), out)
    loaded, info = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    torch.manual_seed(0)
    expected = dict(FAMILIES[name](**TINY[name]).model.named_parameters())
    assert all(torch.equal(p.bfloat16(), expected[n].bfloat16()) for n, p in loaded.named_parameters())
    written = json.loads((out / "golden.json").read_text())
    assert written["sha256"] == export.sha256(out / "model.safetensors")
    assert export.golden_logits(name, loaded.eval()) == pytest.approx(written["logits"], abs=1e-4)
    assert type(AutoProcessor.from_pretrained(out)).__name__ == type(loaded).__name__.replace(
        "ForConditionalGeneration", "Processor"
    )
    assert export.read_log(out / LOG_FILE) == log
    text = (out / "README.md").read_text()
    assert "not finished" not in text
    assert all(f"| {world} | 0.875 | some 0.875 |" in text for world in known)
    assert "| full | 3,000 | 0.001 | 0.19 M | 2.5 | 50 |" in text
    assert f"| basic | 1000 | 0.500 |{' – |' * (len(known) - 1)}" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    assert "natural photographs" in text and "easy-VQA is by Victor Zhou (MIT)" in text


def test_unfinished_models_are_written_only_when_asked(tmp_path, tiny):
    log = rows("basic", 2000, 2000, ("basic",), 0.5) + rows("full", 3000, 1600, ("basic", "pair"), 0.625)
    log[-2] |= {"stage": "full"}
    made, out = state("pocket-llava", tmp_path / "state", log), tmp_path / "out"
    with pytest.raises(ValueError, match=r"stopped at step 1600 of stage 'full': train on, or give --unfinished"):
        export.export("pocket-llava", made, out)
    assert not out.exists()
    export.export("pocket-llava", made, out, unfinished=True)
    text = " ".join((out / "README.md").read_text().split())
    assert '**Training has not finished.** These weights are from step 1,600 of 3,000 of the stage "full"' in text
    assert "| full | 1,600 of 3,000 |" in text and "| full | 1500 | 0.625 | 0.625 |" in text
    with pytest.raises(ValueError, match="holds pocket-llava, not pocket-llava-next"):
        export.export("pocket-llava-next", made, out)


def test_the_log_of_the_shipped_first_stage_comes_first(tmp_path, monkeypatch, tiny):
    old = [
        {
            "event": "start",
            "step": 0,
            "steps": 500,
            "batch": 256,
            **{k: START[k] for k in START if k not in ("event",)},
        },
        {"step": 100, "ce": 1.0, "img/s": 2560.0, "seconds": 30.0},
        {"event": "val", "step": 500, **dict.fromkeys(card._OLD_KINDS, 0.5)},
        {"event": "stop", "step": 500, "seconds": 120.0},
        {"event": "test", "questions": 600, **dict.fromkeys(card._OLD_KINDS, 0.25)},
    ]
    new = rows("full", 3000, 1600, ("basic", "pair"), 0.625)
    (tmp_path / "pocket-llava").mkdir()
    shipped = tmp_path / "pocket-llava" / LOG_FILE
    monkeypatch.setattr(export, "HERE", tmp_path)
    made = state("pocket-llava", tmp_path / "state", new)
    for before in (old, old + new):  # again, once it ships
        shipped.write_text("".join(json.dumps(row) + "\n" for row in before))
        log = export.whole_log("pocket-llava", made)
        assert log == old[:-1] + new  # its test was not the last
    text = card.model_card("pocket-llava", log, 1, 1)
    assert "Training has not finished" in text
    assert "| basic | 500 | 0.001 | 0.13 M | 2.0 | 100 |" in text
    assert "| basic | 500 | 0.500 | – |" in text and "0.250" not in text
    assert "earlier version of this code" in text
    assert card.is_finished(old)  # a log of old rows alone still has a card
    assert "| basic | 0.250 | exist 0.250, color 0.250," in card.model_card("pocket-llava", old, 1, 1)


def test_states_that_do_not_fit_are_refused(tmp_path, tiny):
    made = state("pocket-llava", tmp_path / "state", rows("basic", 10, 10, (), 0.0))
    weights = load_file(made / "state-0.safetensors")
    del weights["weight/model.multi_modal_projector.linear_1.bias"]
    save_file(weights, made / "state-0.safetensors")
    with pytest.raises(ValueError, match=r"does not load cleanly: .*multi_modal_projector\.linear_1\.bias"):
        export.export("pocket-llava", made, tmp_path / "out", unfinished=True)
    save_file({"weight/heads.kind.weight": torch.zeros(1)}, made / "state-0.safetensors")
    with pytest.raises(ValueError, match="has no weights"):
        export.export("pocket-llava", made, tmp_path / "out", unfinished=True)
    (made / LOG_FILE).unlink()
    with pytest.raises(ValueError, match="there is no training log"):
        export.export("pocket-llava", made, tmp_path / "out", unfinished=True)


def test_command_line(tmp_path, monkeypatch, capsys, tiny):
    made = state("pocket-llava", tmp_path / "state", rows("basic", 10, 10, ("basic",), 0.5))
    command = ["export", "pocket-llava", "--state", str(made), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        export.main()
    assert "give --unfinished" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*command, "--unfinished"])
    export.main()
    assert (tmp_path / "out" / "README.md").exists()
