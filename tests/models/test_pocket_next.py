# SPDX-License-Identifier: Apache-2.0
"""pocket-llava-next: what training computes is what the stock model computes, and the folder comes back whole."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
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
    LlavaNextForConditionalGeneration,
)

from vtprune.models.pocket import data, export, next, vocab
from vtprune.models.pocket.model import PIXEL_STD, clip_features, llava_config

# The third is padded by half a crop at each side; the last is not a whole number of patches, and is cut a little.
SIZES = [(672, 672), (560, 672), (336, 336), (672, 448), (336, 1008), (784, 336), (672, 533)]
POCKET_LLAVA = export.HERE / "pocket-llava"
TINY = {"vision_width": 32, "vision_layers": 3, "vision_heads": 2, "width": 32, "layers": 2, "heads": 2, "ffn": 64}
QUESTION = "what does the text say ?"


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A crop of generated pictures side by side."""
    scenes = [np.asarray(data.render(data.scene("val", seed + number))) for number in range(3)]
    return Image.fromarray(np.tile(np.concatenate(scenes, 1), (3, 1, 1))[:height, :width])


@pytest.fixture(scope="module")
def model() -> LlavaNextForConditionalGeneration:
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(next.next_config(**TINY)).eval()
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.05)
        weight.data.copy_(weight.data.bfloat16())
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("next")
    next.write_folder(out, dict(model.named_parameters()), model.config)
    return out


@pytest.fixture(scope="module")
def processor(folder) -> Any:
    return AutoProcessor.from_pretrained(folder)


def prompt(processor: Any, images: int = 1) -> str:
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)


def test_architecture():
    config = next.next_config()
    assert config.vision_config.hidden_size == 192
    assert config.text_config.hidden_size == 256
    assert config.text_config.max_position_embeddings == 8192
    assert config.vision_feature_layer == -2
    assert config.tie_word_embeddings


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_training_sees_what_the_stock_model_sees(model, processor, size):
    layout = next.layout_of(*size)
    image = picture(*size)
    inputs = processor(images=image, text=prompt(processor), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, layout.views, 3, 336, 336)
    ids = [vocab.BOS, *[vocab.IMAGE] * layout.length, *vocab.encode(QUESTION)]
    assert inputs["input_ids"].tolist() == [ids]

    canvas = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    pixels = next.views(canvas, layout)
    torch.testing.assert_close(pixels[:, 1:], inputs["pixel_values"][:, 1:], rtol=0, atol=1e-5)
    # The processor rounds the thumbnail to whole levels of 255 twice, after each direction of resampling.
    levels = (pixels[:, 0] - inputs["pixel_values"][:, 0]).abs() * PIXEL_STD * 255
    assert levels.max() < 2
    assert levels.mean() < 0.5

    visual, patches, pooled = next.see(model, inputs["pixel_values"], layout, partial(clip_features, model))
    assert patches.shape == (1, layout.views, 576, 32)
    assert pooled.shape == (1, layout.views, 32)
    stock = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    torch.testing.assert_close(visual[0], getattr(stock, "pooler_output", stock)[0], rtol=0, atol=1e-6)

    embed = model.get_input_embeddings()
    rows = embed(torch.tensor([ids]))
    rows[:, 1 : 1 + layout.length] = visual
    logits = model.lm_head(model.model.language_model(inputs_embeds=rows).last_hidden_state)
    torch.testing.assert_close(logits, model(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES[:-1])
def test_layout(size):
    layout = next.layout_of(*size)
    newline = layout.is_newline
    rows, cols = layout.grid
    assert (rows, cols) == (size[0] // 14, size[1] // 14)
    assert layout.length == 576 + rows * (cols + 1)
    assert newline.sum() == rows
    assert (layout.col[newline] == cols).all()
    assert layout.source[~newline].unique().numel() == layout.length - rows
    left, right, top, bottom = layout.padding
    assert (size[0] + top + bottom, size[1] + left + right) == tuple(336 * count for count in layout.crops)
    # The patch that a token comes from is the one at its row and column of the canvas.
    tokens = torch.arange(576, layout.length)[~newline[576:]]
    crop, patch = layout.source[tokens] // 576 - 1, layout.source[tokens] % 576
    row = crop // layout.crops[1] * 24 + patch // 24
    col = crop % layout.crops[1] * 24 + patch % 24
    assert (row - layout.row[tokens]).unique().tolist() == [top // 14]
    assert (col - layout.col[tokens]).unique().tolist() == [left // 14]


def test_sizes_that_would_be_scaled_are_refused():
    with pytest.raises(ValueError, match="would be scaled"):
        next.layout_of(500, 600)
    layout = next.layout_of(336, 672)
    with pytest.raises(ValueError, match="expected pictures"):
        next.views(torch.zeros(1, 3, 672, 336), layout)
    with pytest.raises(ValueError, match="expected features"):
        next.assemble(torch.zeros(1, 5, 576, 8), torch.zeros(8), layout)


def test_folder(model, folder):
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(loaded) is LlavaNextForConditionalGeneration
    assert not any(info.values()), info
    expected = dict(model.named_parameters())
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, expected[name]), name
    config = json.loads((folder / "config.json").read_text())
    assert config["image_grid_pinpoints"] == next.PINPOINTS == loaded.config.image_grid_pinpoints
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_weights_that_do_not_fit_are_refused(model, tmp_path):
    weights = dict(model.named_parameters())
    del weights["model.image_newline"]
    with pytest.raises(ValueError, match="does not load cleanly"):
        next.write_folder(tmp_path, weights, model.config)


@pytest.mark.parametrize("sizes", [[(560, 672)], [(336, 336), (672, 448)]])
@torch.no_grad()
def test_generate(model, processor, sizes):
    images = [picture(*size, seed=number) for number, size in enumerate(sizes)]
    inputs = processor(images=images, text=prompt(processor, len(images)), return_tensors="pt")
    visual = sum(next.layout_of(*size).length for size in sizes)
    assert (inputs["input_ids"] == vocab.IMAGE).sum() == visual
    output = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 2


def test_weights_of_pocket_llava_are_taken_over():
    weights = load_file(POCKET_LLAVA / "model.safetensors")
    tokens = len(weights["language_model.model.embed_tokens.weight"])
    model = LlavaNextForConditionalGeneration(next.next_config(vocab_size=tokens + 3))
    state = next.from_llava(weights, model)
    again = next.from_llava(weights, model)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing in ([], ["lm_head.weight"])  # tied
    assert not unexpected
    for name, weight in model.named_parameters():
        assert torch.equal(state[name], again[name])
        old = weights.get(next.disk_name(name))
        if old is not None:
            assert torch.equal(weight[: len(old)], old.float()), name
    table = model.lm_head.weight
    assert table.shape == (tokens + 3, 256)
    assert (table[tokens:] - table[:tokens].mean(0)).abs().max() < table[:tokens].std()
    assert not torch.equal(table[tokens], table[tokens + 1])


def test_pocket_llava_can_be_filled_too():
    weights = load_file(POCKET_LLAVA / "model.safetensors")
    model = LlavaForConditionalGeneration(llava_config())
    state = next.from_llava(weights, model)
    assert state.keys() == dict(model.named_parameters()).keys()


def test_other_weights_are_refused():
    weights = load_file(POCKET_LLAVA / "model.safetensors")
    with pytest.raises(ValueError, match="embeddings"):
        next.from_llava(weights, LlavaNextForConditionalGeneration(next.next_config(width=128, vision_width=192)))
    del weights["multi_modal_projector.linear_1.bias"]
    with pytest.raises(ValueError, match=r"multi_modal_projector\.linear_1\.bias"):
        next.from_llava(weights, LlavaNextForConditionalGeneration(next.next_config()))
