# SPDX-License-Identifier: Apache-2.0
"""Models to measure: embedded ones, checkpoints, or the shape of a well-known one with random weights.

Speed does not depend on what the weights are, only on their shapes. A preset is made on the device itself, so nothing
is downloaded and nothing is said about accuracy.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..models import find_family
from ..models.base import Family
from ..models.loading import embedded_models, load

#: Presets, and what they are the shape of. ``tiny-...`` run anywhere in no time, to try a command.
PRESETS = {
    "llava-1.5-7b": "Vicuna-7B with CLIP ViT-L/14 at 336 px: 576 visual tokens",
    "llava-next-7b": "the same with AnyRes: 2880 visual tokens at 672x672 px",
    "qwen2.5-vl-7b": "Qwen2.5-VL-7B: a visual token for each 28x28 px",
    "tiny-llava": "four layers",
    "tiny-llava-next": "four layers",
    "tiny-qwen2.5-vl": "four layers",
}
#: Height and width in pixels of a picture where nobody says otherwise.
_SIZES = {"llava-next-7b": (672, 672), "qwen2.5-vl-7b": (1008, 1008), "tiny-llava-next": (112, 112)}
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def build(name: str, device: torch.device, dtype: torch.dtype | None = None, attention: str = "sdpa") -> nn.Module:
    """A preset with random weights, or a model that `vtprune.load` finds under that name.

    Parameters
    ----------
    name
        One of `PRESETS`, an embedded model, a checkpoint folder or a hub name.
    device
        Where it is made.
    dtype
        Default bf16 on a GPU, fp32 elsewhere.
    attention
        ``attn_implementation`` of transformers.

    Raises
    ------
    ConfigError
        Nothing goes by that name.
    """
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    if name not in PRESETS:
        if not Path(name).exists() and "/" not in name and name not in embedded_models():
            known = ", ".join([*PRESETS, *embedded_models()])
            raise ConfigError(f"there is no model {name!r}; give a folder, a hub name, or one of: {known}")
        model = load(name, device=device, dtype=dtype)[0]
        model.set_attn_implementation(attention)
        return model
    import transformers

    tiny = name.startswith("tiny-")
    config = _qwen_config(tiny) if "qwen" in name else _llava_config(tiny, "next" in name)
    with device:
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()


def _llava_config(tiny: bool, anyres: bool) -> Any:
    import transformers

    if tiny:
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        side, vocabulary = 4 * 14, 1024
    else:
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
        side, vocabulary = 24 * 14, 32064
    given: dict[str, Any] = {
        "vision_config": transformers.CLIPVisionConfig(**vision, image_size=side, patch_size=14),
        "text_config": transformers.LlamaConfig(**text, vocab_size=vocabulary, max_position_embeddings=4096),
        "image_token_index": vocabulary - 64,
    }
    if not anyres:
        return transformers.LlavaConfig(**given)
    points = [[height * side // 336, width * side // 336] for height, width in _PINPOINTS]
    return transformers.LlavaNextConfig(**given, image_grid_pinpoints=points)


def _qwen_config(tiny: bool) -> Any:
    import transformers

    vision: dict[str, Any]
    text: dict[str, Any]
    if tiny:
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "fullatt_block_indexes": [1]}
        text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        heads, sections, vocabulary = 2, [2, 3, 3], 1024
    else:
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
        vision["fullatt_block_indexes"] = [7, 15, 23, 31]
        text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        heads, sections, vocabulary = 4, [16, 24, 24], 152064
    rope = {"rope_type": "default", "mrope_section": sections}
    if int(transformers.__version__.split(".")[0]) >= 5:
        text["rope_parameters"] = {**rope, "rope_theta": 1e6}
    else:
        text |= {"rope_scaling": rope, "rope_theta": 1e6}
    text |= {"num_key_value_heads": heads, "vocab_size": vocabulary, "max_position_embeddings": 32768}
    # The class defaults of these ids lie outside a small vocabulary.
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "out_hidden_size": text["hidden_size"], "patch_size": 14, "window_size": 112},
        image_token_id=vocabulary - 9,
        video_token_id=vocabulary - 8,
        vision_start_token_id=vocabulary - 12,
        vision_end_token_id=vocabulary - 11,
    )


def default_size(name: str, model: nn.Module) -> tuple[int, int]:
    """Height and width of a picture for this model where nobody says otherwise, in pixels."""
    if name in _SIZES:
        return _SIZES[name]
    family = find_family(model)
    vision = family.config.vision_config
    if hasattr(family, "merge"):
        unit = family.merge * vision.patch_size
        return 12 * unit, 12 * unit
    side = int(vision.image_size)
    return (2 * side, 2 * side) if family.config.model_type == "llava_next" else (side, side)


def make_inputs(
    model: nn.Module, batch: int = 1, size: tuple[int, int] | None = None, text: int = 64
) -> dict[str, Any]:
    """Prompts of random words around one picture of noise each, on the model's device and in its dtype.

    Parameters
    ----------
    model
        A stock transformers model of a supported family.
    batch
        Samples.
    size
        Height and width of the picture in pixels; rounded down to what the model can cut into patches. Without meaning
        for LLaVA, whose pictures have one size.
    text
        Rows of a prompt that are not visual tokens: words, and the separators that the picture brings with it.

    Raises
    ------
    ConfigError
        The separators alone are more than `text`.
    """
    family = find_family(model)
    device, dtype = family.model.device, family.model.dtype
    generator = torch.Generator().manual_seed(0)
    pixels, beside = _pixels(family, batch, size or default_size("", model), generator)
    layout = family.layouts("image", {"pixel_values": pixels, **beside})[0]
    words = text - (layout.length - len(layout.rank)) - 2 * ("image_grid_thw" in beside)
    if words < 2:
        raise ConfigError(
            f"text={text} rows are too few: {text - words} are separators of the picture; give at least "
            f"{text - words + 2}"
        )
    config = family.config
    placeholder = family.placeholders["image"]
    barred = {*family.special_ids, placeholder}
    ordinary = torch.tensor([i for i in range(min(900, len(family.vocabulary))) if i not in barred])
    drawn = ordinary[torch.randint(len(ordinary), (words,), generator=generator)].tolist()
    picture = [placeholder] * layout.length
    if "image_grid_thw" in beside:
        picture = [config.vision_start_token_id, *picture, config.vision_end_token_id]
    ids = torch.tensor([[*drawn[: words // 2], *picture, *drawn[words // 2 :]]]).expand(batch, -1).contiguous()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(dtype), **beside}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == placeholder).int()
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _pixels(
    family: Family, batch: int, size: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Mapping[str, Tensor]]:
    vision = family.config.vision_config
    if hasattr(family, "merge"):
        unit = family.merge * vision.patch_size
        rows, cols = (max(1, side // unit) * family.merge for side in size)
        # Patches are two frames deep, for a single picture too.
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(batch * rows * cols, width, generator=generator)
        return pixels, {"image_grid_thw": torch.tensor([[1, rows, cols]] * batch)}
    side = vision.image_size
    if family.config.model_type != "llava_next":
        return torch.randn(batch, 3, side, side, generator=generator), {}
    sizes = torch.tensor([size] * batch)
    views = len(family.layouts("image", {"image_sizes": sizes[:1]})[0].seg_lens)
    return torch.randn(batch, views, 3, side, side, generator=generator), {"image_sizes": sizes}
