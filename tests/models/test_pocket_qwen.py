# SPDX-License-Identifier: Apache-2.0
"""pocket-qwen2.5-vl: the fast vision forward, positions, borrowed weights and the folder agree with transformers."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
)

from vtprune.models.pocket import export, layout, qwen, vocab
from vtprune.models.pocket.families import FAMILIES, folder_weights
from vtprune.models.pocket.model import PIXEL_MEAN, PIXEL_STD, llava_config

TYPE = {vocab.IMAGE: 1, vocab.VIDEO: 2}
SMALL = {"vision_width": 32, "vision_layers": 4, "vision_heads": 2, "vision_ffn": 48, "full_attention": (1, 3)}
TEXT = {"width": 32, "layers": 2, "heads": 2, "ffn": 48}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(qwen.qwen_config(**SMALL, **TEXT)).eval()
    for weight in model.parameters():
        # bf16 values, so that they come back from the folder as they were.
        weight.data = (weight + 0.1 * torch.randn_like(weight)).bfloat16().float()
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Any:
    out = tmp_path_factory.mktemp("pocket") / "pocket-qwen2.5-vl"
    qwen.write_folder(out, model.state_dict(), model.config)
    return out


@pytest.fixture(scope="module")
def processor(folder) -> Any:
    return AutoProcessor.from_pretrained(folder)


def patches(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the stock processor makes of pictures or clips: rows of patches, and their grids."""
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 2, -1, -1, -1)
    count, frames, _, height, width = pixels.shape
    rows = pixels.reshape(count, frames // 2, 2, 3, height // 28, 2, 14, width // 28, 2, 14)
    rows = rows.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 3 * 2 * 14 * 14)
    return rows, torch.tensor([[frames // 2, height // 14, width // 14]] * count)


@torch.no_grad()
@pytest.mark.parametrize(
    "frames, height, width",
    [(1, 336, 336), (8, 224, 224), (1, 672, 672), (1, 168, 168), (1, 224, 168), (4, 140, 252), (1, 28, 56)],
)
def test_it_sees_what_the_stock_model_sees(model, frames, height, width):
    generator = torch.Generator().manual_seed(frames + height + width)
    count = 1 if height == 672 else 2  # the stock forward of large pictures is slow
    pixels = torch.randn(count, frames, 3, height, width, generator=generator)
    out = model.model.visual(*patches(pixels))
    expected = getattr(out, "pooler_output", out)
    got = qwen.see(model.model.visual, pixels)
    assert got.shape == (count, max(frames // 2, 1), height * width // 28**2, 32)
    torch.testing.assert_close(got.flatten(0, 2), expected, rtol=0, atol=1e-5)


def test_it_sees_in_one_graph_and_learns(model):
    pixels = torch.randn(1, 2, 3, 84, 56)
    see = torch.compile(qwen.see, backend="eager", fullgraph=True)
    got = see(model.model.visual, pixels)
    torch.testing.assert_close(got, qwen.see(model.model.visual, pixels))
    got.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.model.visual.parameters())
    model.zero_grad()


@pytest.mark.parametrize("shape", [(1, 3, 3, 112, 112), (1, 1, 3, 100, 112)])
def test_pixels_that_do_not_fit_are_refused(model, shape):
    with pytest.raises(ValueError, match="even number, and sides in steps of 28"):
        qwen.see(model.model.visual, torch.zeros(shape))


def prompt(*runs: int | tuple[int, tuple[int, int, int]]) -> torch.Tensor:
    ids = []
    for run in runs:
        if isinstance(run, int):
            ids += [vocab.IDS["circle"]] * run
        else:
            token, (t, h, w) = run
            ids += [vocab.VISION_START, *[token] * (t * h * w), vocab.VISION_END]
    return torch.tensor([ids])


def stock_positions(model: Any, ids: torch.Tensor, **grids: torch.Tensor) -> torch.Tensor:
    function = model.model.get_rope_index
    if "mm_token_type_ids" in inspect.signature(function).parameters:
        grids["mm_token_type_ids"] = torch.tensor([[TYPE.get(token, 0) for token in row] for row in ids.tolist()])
    return function(ids, **grids, attention_mask=torch.ones_like(ids))[0][:, 0]


@pytest.mark.parametrize("shapes", [[(1, 4, 4)], [(1, 3, 5), (1, 6, 2)]])
def test_positions_of_pictures(model, shapes):
    ids = prompt(2, *((vocab.IMAGE, shape) for shape in shapes), 3)
    expected = stock_positions(model, ids, image_grid_thw=torch.tensor([[t, 2 * h, 2 * w] for t, h, w in shapes]))
    runs = [3, shapes[0], *(run for shape in shapes[1:] for run in (2, shape)), 4]
    assert qwen.positions(runs).tolist() == expected.tolist()


@pytest.mark.parametrize("grid", [(4, 8, 8), (8, 8, 8), (16, 8, 8)])
def test_positions_of_clips(model, grid):
    t, h, w = grid
    expected = stock_positions(
        model,
        prompt(2, (vocab.VIDEO, grid), 3),
        video_grid_thw=torch.tensor([[t, 2 * h, 2 * w]]),
        second_per_grid_ts=torch.tensor([2 / qwen.FPS]),
    )
    rules = [qwen.positions([3, grid, 4], time_counts=counts).tolist() for counts in (False, True)]
    assert expected.tolist() in rules  # which of the two depends on the version
    assert (rules[0] == rules[1]) == (t <= h)
    assert qwen.positions([1, (3, 1, 1)], step=2)[0].tolist() == [0, 1, 3, 5]


@torch.no_grad()
def test_a_borrowed_language_model_says_the_same():
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(llava_config(vision_width=32, vision_layers=1, vision_heads=2, **TEXT)).eval()
    state = {layout.disk_name(name): tensor for name, tensor in llava.state_dict().items() if name != "lm_head.weight"}
    rows = llava.config.text_config.vocab_size
    weights = qwen.from_llava(state, rows + 5)
    model = Qwen2_5_VLForConditionalGeneration(qwen.qwen_config(rows + 5, **SMALL, **TEXT)).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith("model.visual.") or name == "lm_head.weight" for name in missing)
    ids = torch.tensor([[vocab.BOS, *vocab.encode("what color is the circle ?")]])
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits[..., :rows], llava(input_ids=ids).logits, rtol=0, atol=1e-5)
    added = weights["model.language_model.embed_tokens.weight"][rows:]
    assert len(added.unique(dim=0)) == 5
    with pytest.raises(ValueError, match="cannot hold"):
        qwen.from_llava(state, rows - 1)


def test_the_shipped_language_model_fits():
    state = load_file(export.HERE / "pocket-llava" / "model.safetensors")
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(qwen.qwen_config(330))
    own = model.state_dict()
    weights = qwen.from_llava(state, 330)
    for name, tensor in weights.items():
        assert own[name].shape == tensor.shape, name
    assert {name for name in own if name.startswith("model.language_model.")} == weights.keys()
    stored = [weight for name, weight in model.named_parameters() if name != "lm_head.weight"]  # tied, so stored once
    assert 2 * sum(weight.numel() for weight in stored) <= 15.7 * 2**20


@torch.no_grad()
def test_the_folder_loads_cleanly_and_says_the_same(model, folder):
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(loaded) is Qwen2_5_VLForConditionalGeneration
    assert not any(info.values()), info
    inputs = qwen.golden_inputs()
    torch.testing.assert_close(loaded.eval()(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no place on disk"):
        qwen.disk_name("heads.kind.weight")
    with pytest.raises(ValueError, match="tokenizer has"):
        qwen.write_folder(folder, {}, qwen.qwen_config(10_000, **SMALL, **TEXT))


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chat(processor: Any, *parts: str) -> str:
    content = [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in parts]
    return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)


@pytest.mark.parametrize("side, tokens", [(112, 16), (224, 64), (336, 144), (672, 576)])
def test_pictures_keep_their_size(processor, side, tokens):
    image = picture(side, side)
    inputs = processor(images=[image], text=[chat(processor, "image", "How many objects are there?")])
    words = vocab.encode("how many objects are there ?")
    expected = [vocab.BOS, vocab.VISION_START, *[vocab.IMAGE] * tokens, vocab.VISION_END, *words]
    assert list(inputs["input_ids"][0]) == expected
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - PIXEL_MEAN) / PIXEL_STD
    rows = torch.as_tensor(np.asarray(inputs["pixel_values"]))
    torch.testing.assert_close(rows, patches(pixels[None, None])[0], rtol=0, atol=1e-5)


def test_clips_keep_their_size(processor):
    clip = np.random.default_rng(0).integers(0, 256, (32, 224, 224, 3), dtype=np.uint8)
    inputs = processor(
        videos=[clip], text=[chat(processor, "video", "is there a circle ?")], video_metadata=qwen.video_metadata([32]),
        return_tensors="pt",
    )  # fmt: skip
    assert inputs["video_grid_thw"].tolist() == [[16, 16, 16]]
    assert (inputs["input_ids"] == vocab.VIDEO).sum() == 16 * 64
    assert [float(x) for x in inputs["second_per_grid_ts"]] == [1.0]
    pixels = (torch.from_numpy(clip).permute(0, 3, 1, 2) / 255 - PIXEL_MEAN) / PIXEL_STD
    torch.testing.assert_close(inputs["pixel_values_videos"], patches(pixels[None])[0], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["picture", "pictures", "clip"])
def test_it_answers_from_the_folder(model, processor, kind):
    clip = np.random.default_rng(0).integers(0, 256, (4, 56, 112, 3), dtype=np.uint8)
    if kind == "clip":
        given = {"videos": [clip], "video_metadata": qwen.video_metadata([4])}
        parts, runs = ["video"], [2, (2, 2, 4), 5]
    elif kind == "pictures":
        given = {"images": [picture(56, 112), picture(84, 84)]}
        parts, runs = ["image", "image"], [2, (1, 2, 4), 2, (1, 3, 3), 5]
    else:
        given, parts, runs = {"images": [picture(56, 112)]}, ["image"], [2, (1, 2, 4), 5]
    inputs = processor(**given, text=[chat(processor, *parts, "is there a circle")], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    length = inputs["input_ids"].shape[1]
    assert output.shape == (1, length + 3)
    # The positions that training uses are those of the stock path.
    ours = model(**inputs | {"position_ids": qwen.positions(runs)[:, None]}).logits
    torch.testing.assert_close(model(**inputs).logits, ours, rtol=0, atol=1e-5)
    assert output[0, length] == ours[0, -1].argmax()


@torch.no_grad()
def test_a_batch_says_what_each_says_alone(model, processor):
    images, questions = [picture(56, 112), picture(84, 84)], ["is there a circle ?", "how many objects are there ?"]
    texts = [chat(processor, "image", question) for question in questions]
    batch = model(**processor(images=images, text=texts, padding=True, return_tensors="pt")).logits[:, -1]
    for row, image, text in zip(batch, images, texts, strict=True):
        alone = model(**processor(images=[image], text=[text], return_tensors="pt")).logits[0, -1]
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)


def test_answers_are_joined_to_words(processor):
    ids = [vocab.IDS[token] for token in ["##K", "##7", "##P", "</s>"]]
    assert processor.decode(ids, skip_special_tokens=True) == "K7P"


def test_conversations(processor):
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "is there a circle ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": "what color is the circle ?"},
    ]
    ids = processor.tokenizer(processor.apply_chat_template(messages, tokenize=False))["input_ids"]
    assert ids == [
        *(vocab.BOS, vocab.VISION_START, vocab.VIDEO, vocab.VISION_END),
        *(*vocab.encode("is there a circle ? yes"), vocab.EOS),
        *vocab.encode("what color is the circle ?"),
    ]


def test_training_can_go_on_from_the_weights_that_ship():
    qwen_name = "pocket-qwen2.5-vl"
    family = FAMILIES[qwen_name]()
    weights = family.start(folder_weights(export.HERE / qwen_name))
    assert weights.keys() == {name for name, _ in family.model.named_parameters()} - {"lm_head.weight"}
    family.model.load_state_dict({n: w.float() for n, w in weights.items()}, strict=False)
    expected = dict(
        AutoModelForImageTextToText.from_pretrained(export.HERE / qwen_name, dtype=torch.float32).named_parameters()
    )
    assert all(torch.equal(p, expected[name]) for name, p in family.model.named_parameters())
    some = {name: w for name, w in folder_weights(export.HERE / qwen_name).items() if "blocks.0" not in name}
    with pytest.raises(ValueError, match=r"not those of such a pocket-qwen2.5-vl: visual.blocks.0"):
        family.start(some)
