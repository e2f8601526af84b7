# SPDX-License-Identifier: Apache-2.0
"""``pocket-llava-next``: AnyRes crops in fixed shapes for training, weights from ``pocket-llava``, and its folder.

A picture becomes a thumbnail and the crops of its canvas. The visual tokens are the thumbnail's 576, then the rows of
patches of the whole canvas without its padding, each with a newline after it. Where each token comes from depends on
the picture's size alone, so it is worked out once, with the functions of ``transformers`` themselves, and training
needs one index into tensors of fixed shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, PreTrainedModel
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import unpad_image

from . import layout as disk
from . import vocab
from .batch import PATCH, PATCHES
from .data import SIDE
from .model import PIXEL_MEAN, PIXEL_STD, llava_config

# Height and width of the canvases, in the order in which ties are broken.
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NEWLINE = "image_newline"

_PER_SIDE = SIDE // PATCH
_TABLE = "language_model.model.embed_tokens.weight"
_NOISE = 0.1  # of new embeddings, in standard deviations of the old ones


def next_config(**widths: int) -> LlavaNextConfig:
    """Configuration of ``pocket-llava-next``.

    Parameters
    ----------
    **widths
        As for ``llava_config``: ``vocab_size``, ``vision_width``, ``vision_layers``, ``vision_heads``, ``width``,
        ``layers``, ``heads`` and ``ffn``; smaller numbers are for tests.
    """
    base = llava_config(**widths)
    return LlavaNextConfig(
        vision_config=base.vision_config,
        text_config=base.text_config,
        image_token_index=base.image_token_index,
        image_seq_length=base.image_seq_length,
        vision_feature_layer=base.vision_feature_layer,
        vision_feature_select_strategy=base.vision_feature_select_strategy,
        image_grid_pinpoints=[list(pinpoint) for pinpoint in PINPOINTS],
        tie_word_embeddings=True,
    )


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the N visual tokens of a picture come from.

    Attributes
    ----------
    height, width
        Size of the picture in pixels.
    padding
        Black pixels at the left, right, top and bottom of it, which make it the canvas.
    crops
        Rows and columns of crops that the canvas is cut into.
    grid
        Rows and columns of patches that are left of the canvas when it is unpadded: those of the picture itself, where
        its sides and its padding are whole numbers of patches.
    source
        int64 [N]: token's place in the features of all views, ``576 * view + patch`` (view 0 is the thumbnail), and
        ``576 * views`` for a newline.
    row, col
        int64 [N]: place in the thumbnail for the first 576 tokens, in the unpadded grid for the others; a newline's
        column is the first one outside the grid.
    is_newline
        bool [N].
    """

    height: int
    width: int
    padding: tuple[int, int, int, int]
    crops: tuple[int, int]
    grid: tuple[int, int]
    source: Tensor
    row: Tensor
    col: Tensor
    is_newline: Tensor

    @property
    def views(self) -> int:
        """Thumbnail and crops."""
        return 1 + self.crops[0] * self.crops[1]

    @property
    def length(self) -> int:
        """Visual tokens, N."""
        return len(self.source)


@lru_cache(maxsize=64)
def layout_of(height: int, width: int, device: str | torch.device = "cpu") -> Layout:
    """Layout of the pictures of one size.

    Parameters
    ----------
    height, width
        Size of the picture in pixels.
    device
        Where the index tensors are.

    Returns
    -------
    Layout
        The same object for the same arguments.

    Raises
    ------
    ValueError
        If the image processor would scale pictures of this size: only sizes that touch two opposite sides of their
        best canvas can be cut without resampling.
    """
    size = (height, width)
    tall, wide = select_best_resolution(size, PINPOINTS)
    if get_patch_output_size(torch.empty(1, *size, device="meta"), (tall, wide), ChannelDimension.FIRST) != size:
        raise ValueError(f"a picture of {height} x {width} would be scaled to fit its canvas of {tall} x {wide}")
    left, top = (wide - width) // 2, (tall - height) // 2
    padding = (left, wide - width - left, top, tall - height - top)

    crops = (tall // SIDE, wide // SIDE)
    views = 1 + crops[0] * crops[1]
    numbers = torch.arange(PATCHES, views * PATCHES).view(*crops, _PER_SIDE, _PER_SIDE)
    canvas = numbers.permute(0, 2, 1, 3).reshape(1, crops[0] * _PER_SIDE, crops[1] * _PER_SIDE)
    kept = unpad_image(canvas, size)[0]
    rows, cols = kept.shape

    source = torch.cat([torch.arange(PATCHES), F.pad(kept, (0, 1), value=views * PATCHES).flatten()])
    small, large = torch.arange(_PER_SIDE), torch.arange(rows)
    row = torch.cat([small.repeat_interleave(_PER_SIDE), large.repeat_interleave(cols + 1)])
    col = torch.cat([small.repeat(_PER_SIDE), torch.arange(cols + 1).repeat(rows)])
    source, row, col = source.to(device), row.to(device), col.to(device)
    return Layout(height, width, padding, crops, (rows, cols), source, row, col, source == views * PATCHES)


def views(canvas: Tensor, layout: Layout) -> Tensor:
    """Cut pictures as the image processor does.

    Parameters
    ----------
    canvas
        float [P, 3, H, W] in [0, 1]: P pictures of the layout's size.
    layout
        From ``layout_of``.

    Returns
    -------
    Tensor
        float [P, views, 3, 336, 336], normalised: the thumbnail, then the crops row by row. The padding is black
        before normalisation, so -2 after it.

    Raises
    ------
    ValueError
        If the pictures are not of the layout's size.
    """
    if canvas.ndim != 4 or canvas.shape[1:] != (3, layout.height, layout.width):
        raise ValueError(f"expected pictures [P, 3, {layout.height}, {layout.width}], got {list(canvas.shape)}")
    thumbnail = F.interpolate(canvas, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    rows, cols = layout.crops
    crops = F.pad(canvas, layout.padding).view(-1, 3, rows, SIDE, cols, SIDE)
    crops = crops.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return (torch.cat([thumbnail[:, None], crops], 1) - PIXEL_MEAN) / PIXEL_STD


def assemble(features: Tensor, newline: Tensor, layout: Layout) -> Tensor:
    """Put the features of all views in the order of the prompt.

    Parameters
    ----------
    features
        float [P, views, 576, D], projected.
    newline
        float [D], the model's ``image_newline``.
    layout
        From ``layout_of``, on the same device.

    Returns
    -------
    Tensor
        float [P, N, D].

    Raises
    ------
    ValueError
        If the features are not of the layout's views.
    """
    if features.shape[1:-1] != (layout.views, PATCHES):
        raise ValueError(f"expected features [P, {layout.views}, {PATCHES}, D], got {list(features.shape)}")
    last = newline.to(features.dtype).expand(len(features), 1, -1)
    return torch.cat([features.flatten(1, 2), last], 1).index_select(1, layout.source)


def see(
    model: LlavaNextForConditionalGeneration,
    pixels: Tensor,
    layout: Layout,
    tower: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the vision tower and the projector on pictures of one size.

    Parameters
    ----------
    model
        The network.
    pixels
        float [P, views, 3, 336, 336], from ``views``.
    layout
        From ``layout_of``, on the same device.
    tower
        ``model.clip_features`` of this network, perhaps compiled.

    Returns
    -------
    tuple of Tensor
        Visual tokens [P, N, D], as the stock model makes them; patch features [P, views, 576, W] that they are made
        from; pooled CLS [P, views, W].
    """
    inner, shape = model.model, pixels.shape[:2]
    patches, pooled = tower(pixels.flatten(0, 1))
    visual = inner.multi_modal_projector(patches).unflatten(0, shape)
    return (
        assemble(visual, inner.image_newline, layout),
        patches.unflatten(0, shape),
        pooled.unflatten(0, shape),
    )


def disk_name(name: str) -> str:
    """Name of a parameter on disk.

    Raises
    ------
    ValueError
        If the parameter has none.
    """
    return NEWLINE if name == f"model.{NEWLINE}" else disk.disk_name(name)


def from_llava(weights: Mapping[str, Tensor], model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """Weights to start from, made of those of ``pocket-llava``.

    Parameters
    ----------
    weights
        Weights of ``pocket-llava`` under their names on disk.
    model
        The network to be filled: of ``pocket-llava-next``, or of ``pocket-llava`` itself. Its vocabulary may be larger
        than the old one, of which it must be a continuation.
    seed
        Of the newline and the new embeddings, which are the mean of the old embeddings plus a little noise.

    Returns
    -------
    dict
        float32 tensors under the names of ``model.named_parameters()``; the tied ``lm_head.weight`` is not among them.

    Raises
    ------
    ValueError
        If the weights do not fit the network.
    """
    old = weights[_TABLE].float() if _TABLE in weights else torch.empty(0)
    names = {name: disk_name(name) for name, _ in model.named_parameters()}
    odd = sorted({*names.values(), NEWLINE} ^ {*weights, NEWLINE})
    if odd:
        raise ValueError(f"the weights are not those of such a pocket-llava: {', '.join(odd[:3])}")
    vocabulary, width = model.get_input_embeddings().weight.shape
    if len(old) > vocabulary or old.shape[1:] != (width,):
        raise ValueError(f"embeddings {list(old.shape)} do not fit the network's {[vocabulary, width]}")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vocabulary - len(old) + 1, width, generator=generator) * _NOISE * old.std()
    new = old.mean(0) + noise
    filled = {**weights, _TABLE: torch.cat([old, new[1:]]), NEWLINE: new[0]}
    state = {name: filled[disk].float() for name, disk in names.items()}
    wrong = [name for name, p in model.named_parameters() if p.shape != state[name].shape]
    if wrong:
        raise ValueError(f"{wrong[0]} does not have the network's shape")
    return state


def config_dict(config: LlavaNextConfig) -> dict[str, Any]:
    """``config.json``, with the keys that transformers 4.57 to 5 agree on."""
    return {
        **disk.config_dict(config),
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": config.image_grid_pinpoints,
    }


def small_files(config: LlavaNextConfig) -> dict[str, Any]:
    """Name and content of the JSON files beside the weights, the tokenizer's vocabulary excepted."""
    files = disk.small_files(config)
    files["config.json"] = config_dict(config)
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        files[name]["processor_class"] = "LlavaNextProcessor"
    files["preprocessor_config.json"] |= {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "size": {"shortest_edge": SIDE},
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_pad": True,
    }
    return files


def golden_inputs() -> dict[str, Tensor]:
    """A fixed input that needs neither drawing nor a processor: waves for a picture of 336 x 672, and one question.

    Returns
    -------
    dict
        ``pixel_values`` float32 [1, 3, 3, 336, 336], ``image_sizes`` int64 [1, 2], ``input_ids`` and
        ``attention_mask`` int64 [1, 1783].
    """
    size = (SIDE, 2 * SIDE)
    layout = layout_of(*size)
    ids = torch.tensor([[vocab.BOS, *[vocab.IMAGE] * layout.length, *vocab.encode(disk.GOLDEN_QUESTION)]])
    return {
        "pixel_values": disk.waves(1, layout.views, 3, SIDE, SIDE),
        "image_sizes": torch.tensor([size]),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def write_folder(out: Path, weights: Mapping[str, Tensor], config: LlavaNextConfig) -> PreTrainedModel:
    """Write the folder that ``transformers`` loads, its model card and log excepted.

    Parameters
    ----------
    out
        Folder to write; files of the same names are replaced.
    weights
        All parameters under their names in a ``LlavaNextForConditionalGeneration``, in any dtype. The output layer may
        be left out, as it is tied to the embedding.
    config
        Configuration of that model.

    Returns
    -------
    PreTrainedModel
        What the folder loads as, in fp32.

    Raises
    ------
    ValueError
        As ``layout.write_files``, or if a name has no place on disk.
    """
    stored = {disk_name(name): weight for name, weight in weights.items() if name != disk.OUTPUT}
    return disk.write_files(out, small_files(config), disk.CHAT_TEMPLATE, disk.build_tokenizer(), stored)
