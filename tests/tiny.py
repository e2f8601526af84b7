# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family, random prompts for them, and batches: built from configs, nothing downloaded.

Sizes are chosen so that mistakes show: grouped-query attention, three different picture sizes, weights large enough
that every token matters to every other one, and Qwen2.5-VL windows so small that its window order is not raster order.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")
QWEN = ("qwen2_vl", "qwen2_5_vl")
LAYERS = 5
VOCABULARY = 120
PAD, BOS, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 110, 111, 112, 113
FIRST_WORD, LAST_WORD = 5, 100
CROP = 56  # pixels; 4 x 4 patches of 14
PINPOINTS = [[112, 112], [56, 112], [112, 56], [168, 56], [56, 168]]

_V5 = int(transformers.__version__.split(".")[0]) >= 5
_TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    initializer_range=0.2,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=None,
    tie_word_embeddings=False,
)

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Image:
    """A picture: pixels for LLaVA-NeXT, patches (even numbers) for Qwen, without meaning for LLaVA."""

    h: int
    w: int


@dataclass(frozen=True)
class Video:
    """A clip for Qwen: temporal patches and patches (even numbers)."""

    t: int
    h: int
    w: int


Part = int | Image | Video

_PICTURES = {
    "llava": (Image(56, 56), Image(56, 56), Image(56, 56)),
    "llava_next": (Image(100, 60), Image(40, 110), Image(60, 150)),
    "qwen2_vl": (Image(8, 12), Image(4, 6), Image(10, 4)),
    "qwen2_5_vl": (Image(8, 12), Image(4, 6), Image(10, 6)),
}


def _text_config(family: str) -> Any:
    if family in ("llava", "llava_next"):
        return transformers.LlamaConfig(**_TEXT, head_dim=8)
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    if _V5:
        return dict(_TEXT, rope_parameters=dict(rope, rope_theta=10000.0))
    return dict(_TEXT, rope_scaling=rope, rope_theta=10000.0)


def _config(family: str) -> Any:
    text = _text_config(family)
    if family in ("llava", "llava_next"):
        vision = transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=CROP,
            patch_size=14,
            projection_dim=32,
        )
        common = dict(vision_config=vision, text_config=text, image_token_index=IMAGE, tie_word_embeddings=False)
        if family == "llava":
            return transformers.LlavaConfig(**common, image_seq_length=16)
        return transformers.LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS)
    common = dict(
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    if family == "qwen2_vl":
        vision = dict(depth=3, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=14)
        return transformers.Qwen2VLConfig(**common, vision_config=vision)
    vision = dict(
        depth=3,
        hidden_size=32,
        out_hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        patch_size=14,
        window_size=56,
        fullatt_block_indexes=[1],
    )
    return transformers.Qwen2_5_VLConfig(**common, vision_config=vision)


_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}


def build(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random model; the same weights for the same seed, whatever the attention.

    Parameters
    ----------
    attention
        ``"sdpa"``, ``"eager"``, or the name of a registered attention function, which the decoder alone then uses.
    """
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = getattr(transformers, _CLASSES[family])(_config(family))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.05)
        for name, p in model.named_parameters():
            if ("visual" in name or "vision_tower" in name) and p.ndim >= 2:
                p.mul_(4)  # the default vision weights are so small that all patches look alike
        model.lm_head.weight[LAST_WORD:] = 0  # so that greedy decoding never writes a placeholder
    torch.set_rng_state(generator_state)
    model = model.eval().to(dtype)
    model.set_attn_implementation(attention if attention in ("sdpa", "eager") else "sdpa")
    if attention not in ("sdpa", "eager"):
        model.model.language_model.config._attn_implementation = attention
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def family_of(model: nn.Module) -> str:
    return str(model.config.model_type)


def dtype_of(model: nn.Module) -> torch.dtype:
    return model.lm_head.weight.dtype


def placeholders(model: nn.Module) -> tuple[int, ...]:
    return (IMAGE, VIDEO) if family_of(model) in QWEN else (IMAGE,)


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward names this argument, which depends on the version of transformers."""
    return name in inspect.signature(model.forward).parameters


def pooled(output: Any) -> list[Tensor]:
    """Rows per image from any return type of `get_image_features` (it changed with transformers 5)."""
    output = getattr(output, "pooler_output", output)
    return [x.reshape(-1, x.shape[-1]) for x in output]


def feature_counts(model: nn.Module, pixel_values: Tensor, image_sizes: Tensor) -> list[int]:
    with torch.no_grad():
        return [len(x) for x in pooled(model.model.get_image_features(pixel_values, image_sizes))]


def crops(model: nn.Module, size: tuple[int, int]) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return int(image_size_to_num_patches(list(size), model.config.image_grid_pinpoints, CROP))


def words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_WORD, LAST_WORD, (count,), generator=generator).tolist()


def sample(model: nn.Module, parts: Sequence[Part], seed: int = 0) -> Inputs:
    """One random prompt without padding: numbers are so many words of text, the rest are pictures and clips."""
    family, dtype = family_of(model), dtype_of(model)
    rng = torch.Generator().manual_seed(seed)
    inputs: Inputs = {}
    images = [p for p in parts if isinstance(p, Image)]
    videos = [p for p in parts if isinstance(p, Video)]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    counts: list[int] = []
    if images and family == "llava":
        inputs["pixel_values"] = noise(len(images), 3, CROP, CROP)
        counts = [16] * len(images)
    elif images and family == "llava_next":
        number = [crops(model, (p.h, p.w)) for p in images]
        inputs["pixel_values"] = noise(len(images), max(number), 3, CROP, CROP)
        inputs["image_sizes"] = torch.tensor([[p.h, p.w] for p in images])
        counts = feature_counts(model, inputs["pixel_values"], inputs["image_sizes"])
    elif images:
        inputs["pixel_values"] = torch.cat([noise(p.h * p.w, 3 * 2 * 14 * 14) for p in images])
        inputs["image_grid_thw"] = torch.tensor([[1, p.h, p.w] for p in images])
        counts = [p.h * p.w // 4 for p in images]
    if videos:
        inputs["pixel_values_videos"] = torch.cat([noise(p.t * p.h * p.w, 3 * 2 * 14 * 14) for p in videos])
        inputs["video_grid_thw"] = torch.tensor([[p.t, p.h, p.w] for p in videos])

    ids: list[int] = []
    left = iter(counts)
    for part in parts:
        if isinstance(part, int):
            ids += words(part, rng)
            continue
        span = [IMAGE] * next(left) if isinstance(part, Image) else [VIDEO] * (part.t * part.h * part.w // 4)
        ids += [VISION_START, *span, VISION_END] if family in QWEN else span
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if takes(model, "mm_token_type_ids"):
        inputs["mm_token_type_ids"] = token_types(inputs["input_ids"])
    return inputs


def token_types(input_ids: Tensor) -> Tensor:
    return (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()


def pictures(model: nn.Module, count: int) -> list[Image]:
    table = _PICTURES[family_of(model)]
    return [table[i % len(table)] for i in range(count)]


def prompt(model: nn.Module, images: int = 1, seed: int = 0, start: int = 3, between: int = 2, end: int = 6) -> Inputs:
    """A prompt with so many pictures of different sizes, text before, between and after them."""
    parts: list[Part] = [start]
    for picture in pictures(model, images):
        parts += [picture, between]
    return sample(model, [*parts, end], seed)


def mixed(model: nn.Module, seed: int = 0) -> list[Inputs]:
    """Four prompts of different length with 2, 0, 1 and 3 pictures; one of them starts with its picture."""
    last = pictures(model, 3)
    return [
        prompt(model, 2, seed),
        prompt(model, 0, seed + 1, end=9),
        prompt(model, 1, seed + 2, start=0),
        sample(model, [4, *last, 7], seed + 3),
    ]


def collate(samples: Sequence[Inputs], side: str = "left") -> Inputs:
    """One padded batch; pictures and clips one after the other, crops padded with zeros as processors do."""
    length = max(s["input_ids"].shape[1] for s in samples)
    batch: Inputs = {}
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
        if key in samples[0]:
            fill = -100 if key == "labels" else 0
            rows = []
            for s in samples:
                missing = length - s[key].shape[1]
                pad = (missing, 0) if side == "left" else (0, missing)
                rows.append(nn.functional.pad(s[key], pad, value=fill))
            batch[key] = torch.cat(rows)
    for key in ("pixel_values", "image_sizes", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        rows = [s[key] for s in samples if key in s]
        if key == "pixel_values" and rows and rows[0].ndim == 5:
            most = max(x.shape[1] for x in rows)
            rows = [nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, most - x.shape[1])) for x in rows]
        if rows:
            batch[key] = torch.cat(rows)
    return batch


def text_only(inputs: Inputs) -> Inputs:
    """The same rows without pictures and without placeholders."""
    ids = inputs["input_ids"].clone()
    ids[(ids == IMAGE) | (ids == VIDEO)] = FIRST_WORD
    kept = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
    if "mm_token_type_ids" in inputs:
        kept["mm_token_type_ids"] = token_types(ids)
    return kept
