# SPDX-License-Identifier: Apache-2.0
"""Training, on tiny networks: it learns, resumes where it stopped, drops tokens, and agrees with stock models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from vtprune.models.pocket import data, plans, train, vocab
from vtprune.models.pocket.batch import IGNORE
from vtprune.models.pocket.families import FAMILIES, Geometry
from vtprune.models.pocket.model import LOG_FILE, PIXEL_MEAN, PIXEL_STD, STATE_FILE
from vtprune.models.pocket.plans import Plan, Stage

TINY = {"vision_width": 32, "vision_layers": 2, "vision_heads": 2, "width": 32, "layers": 2, "heads": 2, "ffn": 64}
QWEN = {**TINY, "vision_ffn": 48, "full_attention": (1,)}
RECIPE = train.Recipe(warmup=2, rewarm=4, log_every=1, check_every=3, check_questions=6, test_questions=6)
BASIC = Plan("basic", 2, text=79)
PAIR = Plan("pair", 2, pictures=2)
LABELS = Plan("icl", 2, Geometry(), 3, 0)
FULL = Stage("full", 4, 2e-3, ((BASIC, 0.5), (PAIR, 0.2), (LABELS, 0.3)))
DROP = Stage("drop", 2, 1e-3, ((BASIC, 0.5), (LABELS, 0.5)), (1 / 4, 1 / 9, 0.0), True)


def made(name: str = "pocket-llava", stage: Stage = FULL, recipe: train.Recipe = RECIPE) -> train.Trainer:
    torch.manual_seed(0)
    family = FAMILIES[name](**(QWEN if name == "pocket-qwen2.5-vl" else TINY))
    return train.Trainer(family, recipe, stage, "cpu", compiled=False)


@pytest.fixture
def stages(monkeypatch) -> tuple[Stage, ...]:
    monkeypatch.setitem(plans.STAGES, "pocket-llava", (FULL, DROP))
    monkeypatch.setitem(train.EXAMS, "pocket-llava", ("basic",))
    return FULL, DROP


def run(trainer: train.Trainer, out: Path, **more: Any) -> bool:
    return train.train(trainer, out, say=lambda line: None, **more)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def losses(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["stage"], row["step"]): row for row in log(folder) if "ce" in row}


def test_training_resumes_where_it_stopped(tmp_path, stages):
    straight = made()
    assert run(straight, tmp_path / "straight")
    assert not run(made(), tmp_path / "state", stop=3)
    resumed = made()
    resumed.load(tmp_path / "state")
    assert (resumed.stage, resumed.step, resumed.fresh) == (FULL, 3, 0)
    assert run(resumed, tmp_path / "state")

    one, two = losses(tmp_path / "straight"), losses(tmp_path / "state")
    assert list(one) == list(two) == [*(("full", s) for s in range(1, 5)), ("drop", 1), ("drop", 2)]
    for step in one:
        assert two[step]["lr"] == one[step]["lr"]
        assert two[step]["ce"] == pytest.approx(one[step]["ce"], rel=5e-3), step
    for name, weight in straight.named.items():
        # The state is bf16: 8 bits of each weight.
        torch.testing.assert_close(resumed.named[name].data, weight.data, rtol=2**-6, atol=2e-3, msg=name)
    assert {p.name for p in (tmp_path / "state").iterdir()} == {
        LOG_FILE, STATE_FILE, *(f"state-{i}.safetensors" for i in range(train.SHARDS))
    }  # fmt: skip

    rows = log(tmp_path / "straight")
    assert [(r["stage"], r["step"]) for r in rows if r.get("event") == "start"] == [("full", 0), ("drop", 0)]
    assert [r["step"] for r in rows if r.get("event") == "stop"] == [4, 2]
    checks = [(r["stage"], r["step"], r.get("keep")) for r in rows if r.get("event") == "val"]
    assert checks == [("full", 3, None), ("full", 4, None), ("drop", 2, None), ("drop", 2, "1/9")]
    assert rows[-1]["event"] == "test" and {"basic/mean", "basic/ocr"} <= rows[-1].keys()


def test_a_state_in_the_next_stage_is_resumed_there(tmp_path, stages):
    trainer = made()
    trainer.begin(DROP)
    assert not run(trainer, tmp_path, stop=1)
    again = made()
    again.load(tmp_path)
    assert (again.stage, again.step) == (DROP, 1)
    frozen = {name for name, p in again.named.items() if not p.requires_grad}
    assert frozen and frozen.isdisjoint(again.trained)


def test_weights_alone_are_a_state_that_warms_up_again(tmp_path, stages):
    assert not run(made(), tmp_path, stop=3)
    whole = {}
    for path in sorted(tmp_path.glob("state-*.safetensors")):
        whole |= load_file(path)
        path.unlink()
    weights = {k: w for k, w in whole.items() if k.startswith("weight/") and not k.startswith("weight/heads.")}
    save_file(weights, tmp_path / "state-0.safetensors")
    trainer = made()
    trainer.load(tmp_path)
    assert (trainer.step, trainer.fresh) == (3, 3)
    assert all(torch.equal(trainer.named[k.removeprefix("weight/")].bfloat16(), w) for k, w in weights.items())
    full, again = RECIPE.rate(FULL, 3), RECIPE.rate(FULL, 3, fresh=3)
    assert again == pytest.approx(full / RECIPE.rewarm)
    assert RECIPE.rate(FULL, 3 + RECIPE.rewarm, fresh=3) == RECIPE.rate(FULL, 3 + RECIPE.rewarm)
    assert not run(trainer, tmp_path, stop=4) or trainer.stage is DROP
    (row,) = [row for row in log(tmp_path) if row.get("fresh")]
    assert row["fresh"] == 3 and losses(tmp_path)["full", 4]["lr"] == pytest.approx(again, abs=1e-6)


def test_rates():
    rates = [RECIPE.rate(FULL, step) for step in range(5)]
    assert rates[0] == pytest.approx(FULL.peak / 2)
    assert max(rates) <= FULL.peak
    assert rates[4] == pytest.approx(RECIPE.floor * FULL.peak)


def test_a_state_of_another_recipe_or_network_is_refused(tmp_path, stages):
    run(made(), tmp_path, stop=1)
    with pytest.raises(ValueError, match="another recipe"):
        made(recipe=train.Recipe(seed=1)).load(tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        made("pocket-llava-next").load(tmp_path)
    (tmp_path / "state-0.safetensors").unlink()
    with pytest.raises(ValueError, match="another network"):
        made().load(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_few_steps_lower_the_loss(name):
    stage = Stage("full", 100, 2e-2, ((BASIC, 1.0),))
    trainer = made(name, stage)
    arrays = plans.batch(trainer.family, BASIC, 0, 0)
    first, *_, last = [trainer.train_step(BASIC, 1.0, arrays) for _ in range(5)]
    assert last["ce"] < 0.9 * first["ce"]
    auxiliary = {"pocket-llava": {"aux", "cls"}, "pocket-llava-next": set(), "pocket-qwen2.5-vl": {"aux"}}[name]
    assert first.keys() - {"ce"} == auxiliary
    assert all(last[loss] < first[loss] for loss in auxiliary)


def test_a_frozen_stage_leaves_the_eye_alone():
    trainer = made(stage=DROP)
    before = {name: p.detach().clone() for name, p in trainer.named.items()}
    arrays = plans.batch(trainer.family, BASIC, 0, 0)
    assert trainer.train_step(BASIC, 1 / 9, arrays).keys() == {"ce"}  # no loss on what patches show
    moved = {name for name, p in trainer.named.items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "language_model" in name}
    assert not any("vision_tower" in name or "projector" in name for name in moved)


@pytest.mark.parametrize("keep", [1 / 2, 1 / 9, 0.0])
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("pocket-llava", BASIC),
        ("pocket-llava", PAIR),
        ("pocket-llava-next", Plan("hires", 1, Geometry(6, 12))),
        ("pocket-qwen2.5-vl", BASIC),
        ("pocket-qwen2.5-vl", Plan("clip", 1, Geometry(4, 4, 8), text=45)),
    ],
)
def test_dropping_keeps_the_text_and_a_fixed_number_of_each_picture(name, plan, keep):
    trainer = made(name, DROP)
    arrays = plans.batch(trainer.family, plan, 0, 0)
    _, coverage = trainer.draw(plan, arrays, 0)
    index = trainer.kept(plan, arrays, coverage, keep, 0)
    assert (index.diff(dim=1) > 0).all()
    length = len(arrays["visual"])
    if keep == 0:
        assert index.tolist() == [[0, *range(length - plan.text, length)]] * plan.prompts
        return
    free = arrays["visual"] & ~arrays["separator"]
    always = (~free).nonzero().flatten()
    size = int(free.sum()) // plan.pictures
    places = free.nonzero().flatten().view(plan.pictures, size)
    for row in index:
        assert torch.isin(always, row).all()
        for picture in places:
            assert torch.isin(picture, row).sum() == round(keep * size / 16) * 16
    assert torch.equal(index, trainer.kept(plan, arrays, coverage, keep, 0))
    assert not torch.equal(index, trainer.kept(plan, arrays, coverage, keep, 1))


@pytest.mark.parametrize("world", ["told", "recall"])
@pytest.mark.parametrize("name", FAMILIES)
def test_demonstrations_in_words_need_no_picture(name, world):
    trainer = made(name, FULL)
    plan = Plan(world, 3, Geometry(), 4, 0)
    arrays = plans.batch(trainer.family, plan, 0, 0)
    with torch.no_grad():
        logits, labels, losses = trainer.forward(plan, arrays, 0)
        ids = {"input_ids": arrays["ids"], "position_ids": arrays["positions"]}
        trainer.model.model.language_model.config._attn_implementation = "eager"
        expected = trainer.model(**ids).logits[:, :-1]
    counted = arrays["labels"][:, 1:] != IGNORE
    assert losses == [] and torch.equal(labels, arrays["labels"][:, 1:][counted])
    torch.testing.assert_close(logits, expected[counted], atol=1e-4, rtol=1e-4)


def stock_of(trainer: train.Trainer) -> Any:
    stock = LlavaForConditionalGeneration(copy.deepcopy(trainer.model.config)).eval()
    stock.model.language_model.config._attn_implementation = "sdpa"
    stock.load_state_dict(trainer.model.state_dict())
    return stock


def shaken() -> train.Trainer:
    trainer = made()
    for weight in trainer.named.values():
        weight.data.add_(torch.randn_like(weight) * 0.05)
    return trainer


@torch.no_grad()
@pytest.mark.parametrize("chat", [False, True])
def test_packed_rows_give_the_logits_of_the_stock_model(chat):
    trainer = shaken()
    stock = stock_of(trainer)
    scenes = [data.scene("val", index) for index in range(2)]
    rows = [data.questions(scene)[:6] for scene in scenes]
    arrays = plans.packed(trainer.family, [(scene,) for scene in scenes], rows, BASIC, [chat] * 2)
    logits, labels, _ = trainer.forward(BASIC, arrays, 0)
    pixels = (trainer.draw(BASIC, arrays, 0)[0] - PIXEL_MEAN) / PIXEL_STD
    expected, right = [], []
    for b, row in enumerate(rows):
        turns = [[(vocab.encode(q.text), [*vocab.encode_answer(q), vocab.EOS])] for q in row]
        for turn in [[one for (one,) in turns]] if chat else turns:
            asked = [token for words, answer in turn for token in words + answer]
            learnt = [flag for words, answer in turn for flag in [False] * len(words) + [True] * len(answer)]
            ids = torch.tensor([[vocab.BOS, *[vocab.IMAGE] * 576, *asked]])
            out = stock(input_ids=ids, pixel_values=pixels[b : b + 1], attention_mask=torch.ones_like(ids)).logits
            at = 576 + torch.tensor(learnt).nonzero().flatten()
            expected.append(out[0, at])
            right += ids[0, at + 1].tolist()
    assert labels.tolist() == right
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-5)


@torch.no_grad()
def test_dropped_tokens_are_as_if_they_had_never_been():
    trainer = shaken()
    stock = stock_of(trainer)
    scenes = [data.scene("val", index) for index in range(2)]
    rows = [data.questions(scene)[:1] for scene in scenes]
    arrays = plans.packed(trainer.family, [(scene,) for scene in scenes], rows, BASIC)
    logits, labels, _ = trainer.forward(BASIC, arrays, 7, 1 / 9)
    pixels, coverage = trainer.draw(BASIC, arrays, 7)
    index = trainer.kept(BASIC, arrays, coverage, 1 / 9, 7)
    visual = trainer.family.look(pixels, BASIC.geometry, trainer.family.see).visual
    expected, right = [], []
    for b, (question,) in enumerate(rows):
        answer = [*vocab.encode_answer(question), vocab.EOS]
        used = index[b][index[b] < 577 + len(vocab.encode(question.text)) + len(answer)]
        embeddings = stock.get_input_embeddings()(arrays["ids"][b])
        embeddings[1:577] = visual[b]
        out = stock.model.language_model(
            inputs_embeds=embeddings[used][None],
            position_ids=used[None],
            attention_mask=torch.ones(1, len(used), dtype=torch.long),
        ).last_hidden_state
        expected.append(stock.lm_head(out)[0, -len(answer) - 1 : -1])
        right += answer
        assert len(used) == 1 + 64 + len(vocab.encode(question.text)) + len(answer)
    assert labels.tolist() == right
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-5)


@torch.no_grad()
def test_with_nothing_kept_there_is_no_picture():
    trainer = shaken()
    stock = stock_of(trainer)
    row = data.questions(data.scene("val", 0))[:1]
    logits = []
    for number in (0, 1):  # another picture changes nothing
        arrays = plans.packed(trainer.family, [(data.scene("val", number),)], [row], Plan("basic", 1, text=79))
        logits.append(trainer.forward(BASIC, arrays, 0, 0.0)[0])
    assert torch.equal(*logits)
    answer = [*vocab.encode_answer(row[0]), vocab.EOS]
    ids = torch.tensor([[vocab.BOS, *vocab.encode(row[0].text), *answer]])
    expected = stock(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(answer) - 1 : -1]
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("world", ["basic", "icl"])
def test_accuracy_counts_whole_answers(world, monkeypatch):
    trainer = made()
    check = train.exam_check(trainer.family, world, "val", 12, batch=8)
    asked = list(train.exam(world, "val", 12))
    assert sum(len(kinds) for _, _, kinds in check.batches) == 12

    def forward(plan, arrays, seed, keep):
        labels = arrays["labels"][:, 1:][arrays["labels"][:, 1:] != IGNORE]
        guess = labels.clone()
        guess[0] += 1  # one wrong token in each batch
        return torch.nn.functional.one_hot(guess, len(vocab.TOKENS) + 1).float(), labels, []

    answers = [[*vocab.encode_answer(d.turns[-1].question), vocab.EOS] for d in asked]
    learnt = torch.cat([a["labels"][a["labels"] != IGNORE] for _, a, _ in check.batches]).tolist()
    assert sorted(learnt) == sorted(token for answer in answers for token in answer)
    monkeypatch.setattr(trainer, "forward", forward)
    scores = trainer.accuracy([check])
    wrong = len(check.batches)
    assert scores[f"{world}/mean"] == pytest.approx(1 - wrong / 12)


def test_easy_vqa_is_scored_and_learnt():
    pytest.importorskip("easy_vqa")
    trainer = made()
    plan = Plan("mixed", 5)
    found = trainer.train_step(plan, 1.0, plans.batch(trainer.family, plan, 0, 0))
    assert all(value.isfinite() for value in found.values())
    check = train.exam_check(trainer.family, "easy-vqa", "test", 6)
    assert trainer.accuracy([check]).keys() == {"easy-vqa/mean"}


SOME = {
    "large": ("pocket-llava-next", Plan("hires", 1, Geometry(12, 12))),
    "tall": ("pocket-llava-next", Plan("hires", 1, Geometry(18, 6))),
    "pair": ("pocket-qwen2.5-vl", Plan("pair", 1, pictures=2, text=91)),
    "labels": ("pocket-qwen2.5-vl", Plan("icl", 1, Geometry(), 3, 0)),
    "clip": ("pocket-qwen2.5-vl", Plan("clip", 1, Geometry(4, 4, 16), text=45)),
}


@pytest.mark.parametrize(("name", "plan"), SOME.values(), ids=SOME)
def test_every_kind_of_batch_can_be_trained_on(name, plan):
    trainer = made(name)
    found = trainer.train_step(plan, 1 / 4, plans.batch(trainer.family, plan, 0, 0))
    assert all(value.isfinite() for value in found.values())
    assert ("aux" in found) == (plan.geometry.frames == 1 and plan.geometry != Geometry(18, 6))
