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
#: Families that run through what is special about a family, and not through every test of the suite.
MORE = ("llava_onevision", "qwen3_vl", "internvl", "idefics3", "smolvlm", "pixtral", "mistral3")
#: Families with M-RoPE, whose pixels are patches.
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
#: Families with views without an own place in the prompt: a picture is so many crops and, beside several, a whole view.
VIEWS = ("internvl", "idefics3", "smolvlm")
PIXTRAL = ("pixtral", "mistral3")
LAYERS = 5
VOCABULARY = 120
PAD, BOS, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 110, 111, 112, 113
FIRST_WORD, LAST_WORD = 5, 100
CROP = 56  # pixels; 4 x 4 patches of 14
VIEW = 112  # pixels of a view of `VIEWS`; 4 x 4 tokens of 2 x 2 patches
ROW_END, GLOBAL, FIRST_CROP = 112, 113, 114  # words that stand around views
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

VIDEO_KEYS = ("pixel_values_videos", "video_grid_thw")

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Image:
    """A picture: pixels for LLaVA-NeXT and OneVision, patches (even numbers) for Qwen and Pixtral, crops for `VIEWS`,
    without meaning for LLaVA."""

    h: int
    w: int


@dataclass(frozen=True)
class Video:
    """A clip: frames (temporal patches) and patches (even numbers; without meaning for OneVision)."""

    t: int
    h: int
    w: int


Part = int | Image | Video

_PICTURES = {
    "llava": (Image(56, 56), Image(56, 56), Image(56, 56)),
    "llava_next": (Image(100, 60), Image(40, 110), Image(60, 150)),
    "qwen2_vl": (Image(8, 12), Image(4, 6), Image(10, 4)),
    "qwen2_5_vl": (Image(8, 12), Image(4, 6), Image(10, 6)),
    "qwen3_vl": (Image(8, 12), Image(4, 6), Image(10, 6)),
    "llava_onevision": (Image(100, 60), Image(40, 110), Image(60, 150)),
    "internvl": (Image(1, 2), Image(1, 1), Image(2, 3)),
    "idefics3": (Image(1, 2), Image(1, 1), Image(2, 3)),
    "smolvlm": (Image(1, 2), Image(1, 1), Image(2, 3)),
    "pixtral": (Image(4, 6), Image(2, 4), Image(6, 2)),
    "mistral3": (Image(8, 12), Image(4, 8), Image(12, 4)),
}


def _text_config(family: str, layers: int) -> Any:
    text = dict(_TEXT, num_hidden_layers=layers)
    if family in ("llava", "llava_next", "idefics3", "smolvlm"):
        return transformers.LlamaConfig(**text, head_dim=8)
    if family in ("llava_onevision", "internvl"):
        return transformers.Qwen2Config(**text)
    if family in PIXTRAL:
        return transformers.MistralConfig(**text, head_dim=8, sliding_window=None)
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    if family == "qwen3_vl":
        text |= {"head_dim": 8}
        rope |= {"mrope_interleaved": True}
    if _V5:
        return dict(text, rope_parameters=dict(rope, rope_theta=10000.0))
    return dict(text, rope_scaling=rope, rope_theta=10000.0)


def _views_config(family: str, text: Any) -> Any:
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=VIEW, patch_size=14
    )
    if family == "internvl":
        vision |= dict(image_size=[VIEW, VIEW], patch_size=[14, 14])
        return transformers.InternVLConfig(
            vision_config=transformers.InternVLVisionConfig(**vision),
            text_config=text,
            image_token_id=IMAGE,
            image_seq_length=16,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )
    cls = transformers.Idefics3Config if family == "idefics3" else transformers.SmolVLMConfig
    return cls(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )


def _pixtral_config(family: str, text: Any) -> Any:
    vision = transformers.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=8,
        image_size=14 * 16,
        patch_size=14,
    )
    common = dict(vision_config=vision, text_config=text, vision_feature_layer=-1, tie_word_embeddings=False)
    if family == "mistral3":
        return transformers.Mistral3Config(**common, image_token_index=IMAGE, spatial_merge_size=2)
    return transformers.LlavaConfig(
        **common, image_token_index=IMAGE, vision_feature_select_strategy="full", image_seq_length=1
    )


def _config(family: str, layers: int) -> Any:
    text = _text_config(family, layers)
    if family in VIEWS:
        return _views_config(family, text)
    if family in PIXTRAL:
        return _pixtral_config(family, text)
    if family in ("llava", "llava_next", "llava_onevision"):
        cls = transformers.SiglipVisionConfig if family == "llava_onevision" else transformers.CLIPVisionConfig
        vision = cls(
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
        if family == "llava_next":
            return transformers.LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS)
        return transformers.LlavaOnevisionConfig(
            **common,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            vision_aspect_ratio="anyres_max_1",  # so that larger pictures are shrunk
        )
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
    if family == "qwen3_vl":
        vision = dict(
            depth=4,
            hidden_size=32,
            out_hidden_size=32,
            intermediate_size=48,
            num_heads=4,
            patch_size=14,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1, 2],
        )
        return transformers.Qwen3VLConfig(**common, vision_config=vision)
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
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "pixtral": "LlavaForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
}


def build(
    family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = LAYERS
) -> nn.Module:
    """A random model; the same weights for the same seed, whatever the attention.

    Parameters
    ----------
    attention
        ``"sdpa"``, ``"eager"``, or the name of a registered attention function, which the decoder alone then uses.
    """
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = getattr(transformers, _CLASSES[family])(_config(family, layers))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.05)
        for name, p in model.named_parameters():
            if any(part in name for part in ("visual", "vision_tower", "vision_model")) and p.ndim >= 2:
                p.mul_(4)  # the default vision weights are so small that all patches look alike
        model.lm_head.weight[LAST_WORD:] = 0  # so that greedy decoding never writes a placeholder
    torch.set_rng_state(generator_state)
    model = model.eval().to(dtype)
    model.set_attn_implementation(attention if attention in ("sdpa", "eager") else "sdpa")
    if attention not in ("sdpa", "eager"):
        decoder(model).config._attn_implementation = attention
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def decoder(model: nn.Module) -> nn.Module:
    """The text model without its head."""
    return getattr(model.model, "text_model", None) or model.model.language_model


def family_of(model: nn.Module) -> str:
    kind = str(model.config.model_type)
    return "pixtral" if model.config.vision_config.model_type == "pixtral" and kind == "llava" else kind


def dtype_of(model: nn.Module) -> torch.dtype:
    return model.lm_head.weight.dtype


def placeholders(model: nn.Module) -> tuple[int, ...]:
    return (IMAGE, VIDEO) if family_of(model) in (*QWEN, "llava_onevision") else (IMAGE,)


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward names this argument, which depends on the version of transformers."""
    return name in inspect.signature(model.forward).parameters


def pooled(output: Any) -> list[Tensor]:
    """Rows per image from any return type of `get_image_features` (it changed with transformers 5)."""
    output = getattr(output, "pooler_output", output)
    return [x.reshape(-1, x.shape[-1]) for x in output]


def feature_counts(model: nn.Module, inputs: Inputs) -> list[int]:
    with torch.no_grad():
        return [len(x) for x in pooled(model.model.get_image_features(**inputs))]


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
    elif images and family in ("llava_next", "llava_onevision"):
        number = [crops(model, (p.h, p.w)) for p in images]
        inputs["pixel_values"] = noise(len(images), max(number), 3, CROP, CROP)
        inputs["image_sizes"] = torch.tensor([[p.h, p.w] for p in images])
        if family == "llava_onevision":
            inputs["batch_num_images"] = torch.tensor([len(images)])
        counts = feature_counts(model, inputs)
    elif images and family in VIEWS:
        counts = [16 * views(p) for p in images]
        pixels = noise(sum(map(views, images)), 3, VIEW, VIEW)
        inputs["pixel_values"] = pixels if family == "internvl" else pixels[None]
    elif images and family in PIXTRAL:
        high, wide = max(p.h for p in images), max(p.w for p in images)
        inputs["pixel_values"] = noise(len(images), 3, 14 * high, 14 * wide)
        inputs["image_sizes"] = torch.tensor([[14 * p.h, 14 * p.w] for p in images])
    elif images:
        inputs["pixel_values"] = torch.cat([noise(p.h * p.w, 3 * 2 * 14 * 14) for p in images])
        inputs["image_grid_thw"] = torch.tensor([[1, p.h, p.w] for p in images])
        counts = [p.h * p.w // 4 for p in images]
    if videos and family == "llava_onevision":
        assert len({p.t for p in videos}) == 1, "OneVision takes clips of one length"
        inputs["pixel_values_videos"] = noise(len(videos), videos[0].t, 3, CROP, CROP)
    elif videos:
        inputs["pixel_values_videos"] = torch.cat([noise(p.t * p.h * p.w, 3 * 2 * 14 * 14) for p in videos])
        inputs["video_grid_thw"] = torch.tensor([[p.t, p.h, p.w] for p in videos])

    ids: list[int] = []
    left = iter(counts)
    for part in parts:
        if isinstance(part, int):
            ids += words(part, rng)
        elif isinstance(part, Video):
            ids += clip(family, part, rng)
        elif family in ("idefics3", "smolvlm"):
            ids += _views(part)
        elif family in PIXTRAL:
            step = 2 if family == "mistral3" else 1
            ids += ([IMAGE] * (part.w // step) + [ROW_END]) * (part.h // step)
            ids[-1] = VISION_END
        else:
            span = [IMAGE] * next(left)
            ids += [VISION_START, *span, VISION_END] if family in (*QWEN, "internvl") else span
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if takes(model, "mm_token_type_ids"):
        inputs["mm_token_type_ids"] = token_types(inputs["input_ids"])
    return inputs


def clip(family: str, video: Video, rng: torch.Generator) -> list[int]:
    """The ids of a clip; Qwen3-VL has a time in words before every frame."""
    frame = [VIDEO] * (video.h * video.w // 4)
    if family == "llava_onevision":
        return [VIDEO] * (4 * video.t + 1)
    if family == "qwen3_vl":
        return [i for t in range(video.t) for i in (*words(1 + t % 2, rng), VISION_START, *frame, VISION_END)]
    return [VISION_START, *frame * video.t, VISION_END]


def views(picture: Image) -> int:
    """Crops and, beside several, the whole."""
    return picture.h * picture.w + (picture.h * picture.w > 1)


def _views(picture: Image) -> list[int]:
    """How the processors of Idefics3 and SmolVLM write a picture: crops row by row, the whole at the end."""
    ids: list[int] = []
    if picture.h * picture.w > 1:
        for row in range(picture.h):
            for col in range(picture.w):
                ids += [VISION_START, FIRST_CROP + (row + col) % 5, *[IMAGE] * 16]
            ids.append(FIRST_WORD)
        ids.append(FIRST_WORD)
    return [*ids, VISION_START, GLOBAL, *[IMAGE] * 16, VISION_START]


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
    several = any("pixel_values" in s and s["pixel_values"].ndim == 5 and "image_sizes" not in s for s in samples)
    for key in ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw", *VIDEO_KEYS):
        rows = [s[key] for s in samples if key in s]
        if key == "pixel_values" and several:  # a row per sample, of all its views; one without pictures has none
            empty = rows[0].new_zeros(1, 1, *rows[0].shape[2:])
            rows = [s.get(key, empty) for s in samples]
        if key == "pixel_values" and rows and rows[0].ndim == 5:
            most = max(x.shape[1] for x in rows)
            rows = [nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, most - x.shape[1])) for x in rows]
        elif (
            key == "pixel_values" and rows and rows[0].ndim == 4
        ):  # sides of different length, where families have that
            high, wide = (max(x.shape[i] for x in rows) for i in (-2, -1))
            rows = [nn.functional.pad(x, (0, wide - x.shape[-1], 0, high - x.shape[-2])) for x in rows]
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
