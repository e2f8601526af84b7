# SPDX-License-Identifier: Apache-2.0
"""``pocket-qwen2.5-vl``: its network, a fast vision forward for training, positions, and the folder on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5_VLConfig

from . import vocab
from .layout import GOLDEN_QUESTION, OUTPUT, build_tokenizer, waves, write_files
from .model import PIXEL_MEAN, PIXEL_STD

PATCH, MERGE, FRAMES, WINDOW = 14, 2, 2, 112
CELL = PATCH * MERGE  # side of one visual token, in pixels
ROPE_THETA = 10000.0
RMS_EPS = 1e-6
MIN_PIXELS = 4 * CELL**2
MAX_PIXELS = 640 * CELL**2  # a little more than 672 x 672, which has 576 tokens
# Two frames are one temporal grid: at two frames a second and one position a second, time advances by one a grid.
FPS = 2.0
TOKENS_PER_SECOND = 1
GOLDEN_SIDE = 336

CHAT_TEMPLATE = """\
{{- '<s>' -}}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {{- '<vision_start><image><vision_end>' -}}
      {%- elif part['type'] == 'video' -%}
        {{- '<vision_start><video><vision_end>' -}}
      {%- elif part['type'] == 'text' -%}
        {{- part['text'] -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '</s>' -}}
  {%- endif -%}
{%- endfor -%}
"""


def _rope_scaling(head: int) -> dict[str, Any]:
    # A quarter of the frequencies for time, the rest for rows and columns, as in the large models.
    side = 3 * (head // 2) // 8
    return {"type": "default", "rope_type": "default", "mrope_section": [head // 2 - 2 * side, side, side]}


def qwen_config(
    vocab_size: int = len(vocab.TOKENS), vision_width: int = 192, vision_layers: int = 6, vision_heads: int = 3,
    vision_ffn: int = 384, full_attention: Sequence[int] = (2, 5), width: int = 256, layers: int = 6, heads: int = 4,
    ffn: int = 624,
) -> Qwen2_5_VLConfig:  # fmt: skip
    """Configuration of ``pocket-qwen2.5-vl``; smaller numbers are for tests.

    The language model has the sizes of pocket-llava's, so that its weights fit (see :func:`from_llava`).
    """
    special = {"pad_token_id": vocab.PAD, "bos_token_id": vocab.BOS, "eos_token_id": vocab.EOS}
    # A plain dict, in the words of transformers 4.57: newer versions turn them into their own.
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": RMS_EPS,
            "rope_theta": ROPE_THETA,
            "rope_scaling": _rope_scaling(width // heads),
            "tie_word_embeddings": True,
            **special,
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_width,
            "intermediate_size": vision_ffn,
            "num_heads": vision_heads,
            "in_channels": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "tokens_per_second": TOKENS_PER_SECOND,
            "window_size": WINDOW,
            "out_hidden_size": width,
            "fullatt_block_indexes": list(full_attention),
        },
        image_token_id=vocab.IMAGE,
        video_token_id=vocab.VIDEO,
        vision_start_token_id=vocab.VISION_START,
        vision_end_token_id=vocab.VISION_END,
        tie_word_embeddings=True,
        **special,
    )


def _places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Row and column of each place of a grid, in raster order: int64 [rows * columns, 2]."""
    grid = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack(grid, -1).flatten(0, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads [B, L, heads, d] by the angles of their patches [L, 1, d], in fp32."""
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def see(visual: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Features of equally sized pictures or clips: the stock forward of the vision tower, without its loops.

    Every temporal grid is on its own in the vision tower. Its patches are cut out in window order; a grid that does
    not fill its last windows is filled up with patches that nobody attends to. So every shape follows from the
    shape of ``pixels``, nothing is gathered and nothing is read back from the device.

    Parameters
    ----------
    visual
        ``model.visual`` of a Qwen2.5-VL model.
    pixels
        Float [P, T, 3, H, W], normalised. One frame is a still picture; else T is even.

    Returns
    -------
    Tensor
        [P, grids, H / 28 * W / 28, D] with max(T / 2, 1) grids: the rows of the stock model, in raster order.

    Raises
    ------
    ValueError
        If the frames are odd or the sides not a multiple of 28.
    """
    config = visual.config
    pictures, frames, channels, height, width = pixels.shape
    if height % CELL or width % CELL or (frames != 1 and frames % FRAMES):
        raise ValueError(
            f"pixels {tuple(pixels.shape)}: need one frame or an even number, and sides in steps of {CELL}"
        )
    grids, span = max(frames // FRAMES, 1), config.window_size // CELL
    rows, columns = height // CELL, width // CELL
    pad_rows, pad_columns = -rows % span, -columns % span
    pixels = F.pad(pixels.flatten(0, 1), (0, pad_columns * CELL, 0, pad_rows * CELL))
    high, wide = (rows + pad_rows) // span, (columns + pad_columns) // span
    windows, size = high * wide, (span * MERGE) ** 2

    # A still picture is both frames of its grid: adding up the weights of the two is the same, for half the work.
    kernel = visual.patch_embed.proj.weight
    kernel = kernel.sum(2, keepdim=True) if frames == 1 else kernel
    batch, depth = pictures * grids, kernel.shape[2]
    cut = pixels.reshape(batch, depth, channels, high, span, MERGE, PATCH, wide, span, MERGE, PATCH)
    patches = cut.permute(0, 3, 7, 4, 8, 5, 9, 2, 1, 6, 10).reshape(batch, windows * size, -1)
    # Under autocast the sums over the layers stay in the precision of the pixels.
    hidden = F.linear(patches.to(kernel.dtype), kernel.flatten(1)).to(pixels.dtype)

    heads = config.num_heads
    head = config.hidden_size // heads
    device = pixels.device
    cell = _places(high * span, wide * span, device).view(high, span, wide, span, 2).transpose(1, 2).reshape(-1, 1, 2)
    at = (cell * MERGE + _places(MERGE, MERGE, device)).flatten(0, 1)  # row and column of each patch
    speed = ROPE_THETA ** -(torch.arange(0, head // 2, 2, device=device, dtype=torch.float32) / (head // 2))
    angle = (at[:, :, None] * speed).flatten(1)
    angle = torch.cat([angle, angle], -1)[:, None]
    cos, sin = angle.cos(), angle.sin()
    real = None
    if pad_rows or pad_columns:
        real = (at[:, 0] < rows * MERGE) & (at[:, 1] < columns * MERGE)

    for index, block in enumerate(visual.blocks):
        full = index in config.fullatt_block_indexes
        segments = 1 if full else windows
        qkv = block.attn.qkv(block.norm1(hidden)).view(batch, windows * size, 3, heads, head)
        query, key, value = qkv.unbind(2)
        parts = (_rotate(query, cos, sin), _rotate(key, cos, sin), value)
        query, key, value = (x.reshape(batch * segments, -1, heads, head).transpose(1, 2) for x in parts)
        mask = None
        if real is not None:
            # A window always holds a real patch: padding stops at the next multiple of the window.
            mask = real.view(segments, 1, 1, -1).repeat(batch, 1, 1, 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + block.attn.proj(out.transpose(1, 2).reshape(hidden.shape))
        hidden = hidden + block.mlp(block.norm2(hidden))

    merged = visual.merger(hidden).view(batch, high, wide, span, span, -1).transpose(2, 3)
    merged = merged.reshape(batch, high * span, wide * span, -1)[:, :rows, :columns]
    return merged.reshape(pictures, grids, rows * columns, -1)


def mrope_picture(
    start: int, grid: tuple[int, int, int], step: int = 1, time_counts: bool = False
) -> tuple[Tensor, int]:
    """Positions of the visual tokens of a picture or clip, and of the text after it.

    Parameters
    ----------
    start
        Position after the text before it.
    grid
        Temporal grids, rows and columns of visual tokens (after merging).
    step
        By how much time advances from one temporal grid to the next. It is 1 when the processor is told ``FPS``.
    time_counts
        Whether the text after it starts past its last position in time too. It does in transformers 4.57 and 5.0;
        in 5.17 and later only rows and columns count. The two differ for clips of more grids than rows and columns.

    Returns
    -------
    Tensor, int
        int64 [3, t * h * w], and the position of the next text token.
    """
    t, h, w = grid
    time, row, column = torch.meshgrid(torch.arange(t) * step, torch.arange(h), torch.arange(w), indexing="ij")
    length = max(h, w, (t - 1) * step + 1) if time_counts else max(h, w)
    return torch.stack([time, row, column]).flatten(1) + start, start + length


def positions(runs: Sequence[int | tuple[int, int, int]], step: int = 1, time_counts: bool = False) -> Tensor:
    """M-RoPE positions of a prompt.

    Parameters
    ----------
    runs
        The prompt from left to right: an int for so many text tokens, ``(t, h, w)`` for a picture or clip of so many
        temporal grids, rows and columns of visual tokens.
    step, time_counts
        As for :func:`mrope_picture`.

    Returns
    -------
    Tensor
        int64 [3, L]: time, row and column of each token.
    """
    parts, start = [], 0
    for run in runs:
        if isinstance(run, int):
            parts.append(torch.arange(start, start + run).expand(3, -1))
            start += run
        else:
            part, start = mrope_picture(start, run, step, time_counts)
            parts.append(part)
    return torch.cat(parts, 1)


def video_metadata(frames: Sequence[int]) -> list[dict[str, float]]:
    """``video_metadata`` for the processor, for clips of so many frames each.

    Without it, transformers 5 takes clips given as arrays for 24 frames a second, and their grids get one and the
    same position in time.
    """
    return [{"total_num_frames": count, "fps": FPS} for count in frames]


def from_llava(state: Mapping[str, Tensor], vocab_size: int = len(vocab.TOKENS), seed: int = 0) -> dict[str, Tensor]:
    """Weights of pocket-llava's language model, under the names of a ``Qwen2_5_VLForConditionalGeneration``.

    Parameters
    ----------
    state
        Content of pocket-llava's ``model.safetensors``.
    vocab_size
        Rows of the new embedding. Its first rows are the old ones; the others are their mean plus a little noise.
    seed
        Seed of the noise.

    Returns
    -------
    dict
        Names ``model.language_model.*`` in the dtype of ``state``, with the biases that Llama lacks as zeros. The
        vision tower is not in it, nor the output layer, which is tied to the embedding.

    Raises
    ------
    ValueError
        If the new vocabulary is smaller than the old one.
    """
    old, new = "language_model.model.", "model.language_model."
    weights = {new + name.removeprefix(old): tensor for name, tensor in state.items() if name.startswith(old)}
    table = weights[new + "embed_tokens.weight"]
    added = vocab_size - len(table)
    if added < 0:
        raise ValueError(f"a vocabulary of {vocab_size} cannot hold the {len(table)} tokens of the weights")
    noise = torch.randn(added, table.shape[1], generator=torch.Generator().manual_seed(seed))
    rows = table.float().mean(0) + 0.1 * table.float().std() * noise
    weights[new + "embed_tokens.weight"] = torch.cat([table, rows.to(table.dtype)])
    for name in list(weights):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights[name.removesuffix("weight") + "bias"] = torch.zeros_like(weights[name][:, 0])
    return weights


_RENAMED = (
    (re.compile(r"^model\.visual\."), "visual."),
    (re.compile(r"^model\.language_model\."), "model."),
)


def disk_name(name: str) -> str:
    """Name on disk of a parameter of the loaded model: that of the first Qwen2.5-VL, which all versions read."""
    for pattern, prefix in _RENAMED:
        if pattern.match(name):
            return pattern.sub(prefix, name)
    raise ValueError(f"no place on disk for the parameter {name!r}")


def from_own(weights: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of a ``pocket-qwen2.5-vl`` folder, under the names of the loaded model; the output layer is tied."""
    names = {disk_name(name): name for name, _ in model.named_parameters() if name != OUTPUT}
    odd = sorted(names.keys() ^ weights.keys())
    if odd:
        raise ValueError(f"the weights are not those of such a pocket-qwen2.5-vl: {', '.join(odd[:3])}")
    return {names[disk]: weight for disk, weight in weights.items()}


def config_dict(config: Qwen2_5_VLConfig) -> dict[str, Any]:
    """``config.json``, with the keys that transformers 4.57 to 5 agree on."""
    text, vision = config.text_config, config.vision_config
    special = {"pad_token_id": vocab.PAD, "bos_token_id": vocab.BOS, "eos_token_id": vocab.EOS}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16",
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "tie_word_embeddings": True,
        **special,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "hidden_act": "silu",
            "max_position_embeddings": text.max_position_embeddings,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": ROPE_THETA,
            "rope_scaling": _rope_scaling(text.hidden_size // text.num_attention_heads),
            "tie_word_embeddings": True,
            **special,
        },
        "vision_config": {
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "hidden_act": "silu",
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "in_channels": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "tokens_per_second": TOKENS_PER_SECOND,
            "window_size": WINDOW,
            "out_hidden_size": vision.out_hidden_size,
            "fullatt_block_indexes": list(vision.fullatt_block_indexes),
        },
    }


def small_files(config: Qwen2_5_VLConfig) -> dict[str, Any]:
    """Name and content of the JSON files beside the weights, the tokenizer's vocabulary excepted."""
    pad, unk, bos, eos, image = vocab.SPECIALS
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    video, start, end = vocab.VISION_SPECIALS
    ids = {"bos_token_id": vocab.BOS, "eos_token_id": vocab.EOS, "pad_token_id": vocab.PAD}
    processor = {"processor_class": "Qwen2_5_VLProcessor"}
    pixels = {
        **processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
    }
    return {
        "config.json": config_dict(config),
        "generation_config.json": {**ids, "do_sample": False, "max_new_tokens": 8},
        "special_tokens_map.json": {**named, "additional_special_tokens": [image, video, start, end]},
        "tokenizer_config.json": {
            **named,
            **processor,
            "additional_special_tokens": [image, video, start, end],
            "extra_special_tokens": {"image_token": image, "video_token": video},
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config.text_config.max_position_embeddings,
            "padding_side": "left",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **pixels},
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen2VLVideoProcessor",
            **pixels,
            "do_sample_frames": False,
            "cap_pixels_per_frame": True,
        },
        "processor_config.json": processor,
    }


def golden_inputs() -> dict[str, Tensor]:
    """A fixed input that needs neither drawing nor a processor: waves for a picture of 336 x 336, and one question.

    Returns
    -------
    dict
        ``pixel_values`` float32 [576, 1176], ``image_grid_thw`` int64 [1, 3], ``input_ids`` and ``attention_mask``
        int64 [1, L], and ``position_ids`` int64 [3, 1, L], which make the input the same for all versions.
    """
    side = GOLDEN_SIDE // PATCH
    picture, question = (1, side // MERGE, side // MERGE), vocab.encode(GOLDEN_QUESTION)
    tokens = side * side // MERGE**2
    before, after = [vocab.BOS, vocab.VISION_START], [vocab.VISION_END, *question]
    ids = torch.tensor([[*before, *[vocab.IMAGE] * tokens, *after]])
    return {
        "pixel_values": waves(side * side, 3 * FRAMES * PATCH**2),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": positions([len(before), picture, len(after)])[:, None],
    }


def write_folder(out: Path, weights: Mapping[str, Tensor], config: Qwen2_5_VLConfig) -> PreTrainedModel:
    """Write the folder that ``transformers`` loads, its model card and log excepted.

    Parameters
    ----------
    out
        Folder to write; files of the same names are replaced.
    weights
        All parameters under their names in a ``Qwen2_5_VLForConditionalGeneration``, in any dtype. The output layer
        may be left out, as it is tied to the embedding.
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
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in vocab.VISION_SPECIALS])
    stored = {disk_name(name): weight for name, weight in weights.items() if name != OUTPUT}
    return write_files(out, small_files(config), CHAT_TEMPLATE, tokenizer, stored)
