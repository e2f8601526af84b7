# SPDX-License-Identifier: Apache-2.0
"""`importance="clip-text"`: the question's text embedding, and rows of the encoder in CLIP's joint space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import vtprune
from vtprune.errors import ConfigError, InputError, UnsupportedModelError, VTPruneWarning
from vtprune.pruners import ClipText
from vtprune.tokens import PRE_PROJECTOR

EYES = {"layers": 2, "head_width": 8, "patch_size": 8, "image_size": 16}
EARS = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


class Words:
    """The tokenizer of the tiny models: a word for each id."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)


def model_and_clip(width: int | None = None, **options: Any) -> tuple[Any, ClipText]:
    model = tiny.build("llava")
    torch.manual_seed(0)
    own = model.config.vision_config.hidden_size
    clip = open_clip.CLIP(12, CLIPVisionCfg(width=width or own, **EYES), CLIPTextCfg(**EARS)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():  # as it is made, all texts are nearly the same to it
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model, ClipText(clip, open_clip.get_tokenizer("ViT-B-32", context_length=16), Words(), **options)


@torch.no_grad()
def by_hand(clip: Any, rows: Tensor, text: str) -> Tensor:
    visual = clip.clip.visual
    joint = visual.ln_post(rows) @ visual.proj
    return cosine_similarity(joint, clip.clip.encode_text(clip.tokenizer([text])))


def test_scores_are_cosines_to_the_question_of_ones_own_sample() -> None:
    model, clip = model_and_clip()
    samples = [tiny.prompt(model, n, seed=n) for n in (2, 1)]
    tokens = vtprune.encode(model, tiny.collate(samples))
    scores = clip.score(tokens)
    assert tokens.text_ids is not None and tokens.text_lens == tuple(map(len, tokens.text_ids))
    start = 0
    for sample, ids, n in zip(samples, tokens.text_ids, tokens.sample_lens(2), strict=True):
        prompt = sample["input_ids"][0].tolist()
        assert prompt[-len(ids) :] == list(ids), "the question is what comes after the last picture"
        want = by_hand(clip, tokens.probes[PRE_PROJECTOR][start : start + n], Words().decode(list(ids)))
        torch.testing.assert_close(scores[start : start + n], want, atol=1e-6, rtol=1e-5)
        alone = clip.score(vtprune.encode(model, sample))
        torch.testing.assert_close(scores[start : start + n], alone, atol=1e-6, rtol=1e-5)
        start += n
    assert torch.equal(model_and_clip(negative=True)[1].score(tokens), -scores)


def test_the_question_decides_what_is_kept() -> None:
    model, clip = model_and_clip()
    sample = tiny.prompt(model, 2)
    other = {**sample, "input_ids": sample["input_ids"].clone()}
    question = vtprune.encode(model, sample).text_lens[0]  # longer than CLIP's context, so all of it changes
    other["input_ids"][0, -question:] = torch.arange(20, 20 + question)
    kept = []
    settings: dict[str, Any] = {"importance": "clip-text", "clip": clip, "mmr_lambda": 1.0}
    with torch.no_grad():
        dense = model(**sample).logits
        for inputs in (sample, other):
            with vtprune.apply(model, "idpruner", keep=5, **settings) as handle:
                model(**inputs)
                kept.append([tuple(i.segments[0].kept.tolist()) for i in handle.report().images])
                assert handle.report().info == {"importance": "clip-text"}
            tokens = vtprune.encode(model, inputs)
            best = clip.score(tokens)[:16].topk(5).indices.sort().values
            assert torch.equal(torch.tensor(kept[-1][0]).nonzero()[:, 0], best)
        assert kept[0] != kept[1]
        with vtprune.apply(model, "idpruner", keep=1.0, **settings):
            assert torch.equal(model(**sample).logits, dense)


def test_without_a_question_nothing_is_more_important() -> None:
    model, clip = model_and_clip()
    image = tiny.sample(model, [3, tiny.Image(1, 1)])
    assert not clip.score(vtprune.encode(model, image)).any()


def test_a_prompt_of_embeddings_has_no_text_to_read() -> None:
    model, clip = model_and_clip()
    sample = tiny.prompt(model, 2)
    embeds = model.get_input_embeddings()(sample.pop("input_ids"))
    with (
        pytest.warns(VTPruneWarning, match="never fired"),
        vtprune.apply(model, "idpruner", importance="clip-text", clip=clip),
        pytest.raises(InputError, match="pass input_ids"),
    ):
        model(inputs_embeds=embeds, **sample)


def test_clip_may_move_between_two_prompts() -> None:
    clip = model_and_clip()[1]
    there = torch.device("meta")
    with torch.no_grad():
        first = clip._embed("a red circle", torch.device("cpu"))
        clip.clip.to(there)
        assert clip._embed("a red circle", there).device == there != first.device


def test_from_a_folder(tmp_path: Path) -> None:
    _, clip = model_and_clip()
    width = clip.width
    config = {"embed_dim": 12, "vision_cfg": {"width": width, **EYES}, "text_cfg": EARS}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(clip.clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    for also in ("scorer.safetensors", "model.safetensors"):  # open_clip would take the pickle before either
        with pytest.raises(ConfigError, match=rf"{tmp_path} has no open_clip_model\.safetensors.*convert them"):
            ClipText.load(tmp_path, Words())
        save_file(clip.clip.state_dict(), tmp_path / also)
    with pytest.raises(ConfigError, match="pickled weights are not read"):
        ClipText.load(tmp_path, Words())
    save_file(clip.clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    loaded = ClipText.load(tmp_path, Words())
    assert torch.equal(*(one._embed("a red circle", torch.device("cpu")) for one in (loaded, clip)))
    for file in ("open_clip_pytorch_model.bin", "open_clip_model.safetensors", "scorer.safetensors"):
        (tmp_path / file).unlink()
    ClipText.load(tmp_path, Words())  # model.safetensors alone
    with pytest.raises(ConfigError, match=r"has no open_clip_config\.json"):
        ClipText.load(tmp_path / "nowhere", Words())


def test_what_does_not_fit_is_refused_at_the_door() -> None:
    model, clip = model_and_clip()
    with pytest.raises(ConfigError, match="do not go together"):
        vtprune.apply(model, "idpruner", importance="clip-text")
    with pytest.raises(ConfigError, match="do not go together"):
        vtprune.apply(model, "idpruner", clip=clip)
    narrow = model_and_clip(width=24)[1]
    with pytest.raises(ConfigError, match="rows of width 24"):
        vtprune.apply(model, "idpruner", importance="clip-text", clip=narrow)
    with pytest.raises(ConfigError, match="no open_clip model"):
        ClipText(nn.Linear(2, 2), clip.tokenizer, Words())
    with pytest.raises(ConfigError, match="must be CLIP's tokenizer"):
        ClipText(clip.clip, clip.tokenizer, None)
    config = vtprune.PruneConfig("idpruner", options={"importance": "clip-text", "clip": clip})
    with pytest.raises(ConfigError, match="no JSON"):
        config.to_json()
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2)
    with pytest.raises((ConfigError, UnsupportedModelError), match="looks at the question"):
        vtprune.apply(vit, "idpruner", importance="clip-text", clip=clip)
