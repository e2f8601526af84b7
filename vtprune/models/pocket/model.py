# SPDX-License-Identifier: Apache-2.0
"""The network of ``pocket-llava``, and what all training shares: heads that are thrown away, and its attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from . import vocab
from .batch import CLASSES, CLS_LABELS, PATCH, PATCHES, TEXT_CLASS
from .data import CHARACTERS, COLORS, SIDE, SIZES, TEXT_LENGTH

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
ATTENTION = "pocket_packed"
STATE_FILE = "state.json"
LOG_FILE = "train_log.jsonl"
MAX_POSITIONS = 8192  # nine pictures of 576 tokens and their text are 5,300


def llava_config(
    vocab_size: int = len(vocab.TOKENS), vision_width: int = 192, vision_layers: int = 6, vision_heads: int = 3,
    width: int = 256, layers: int = 6, heads: int = 4, ffn: int = 624,
) -> LlavaConfig:  # fmt: skip
    """Configuration of ``pocket-llava``; smaller numbers are for tests."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_width,
            intermediate_size=4 * vision_width,
            projection_dim=vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            pad_token_id=vocab.PAD,
            bos_token_id=vocab.BOS,
            eos_token_id=vocab.EOS,
        ),
        image_token_index=vocab.IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def read_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a training state, by their keys, such as ``weight/<name>``."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("state-*.safetensors")):
        state |= load_file(path)
    return state


def clip_features(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What the CLIP tower of a LLaVA or LLaVA-NeXT makes of pictures [P, 3, 336, 336], normalised.

    Returns
    -------
    tuple of Tensor
        Features of the patches [P, 576, width], from the layer that the projector reads; pooled CLS [P, width].
    """
    out = model.model.vision_tower(pixel_values=pixels, output_hidden_states=True)
    return out.hidden_states[model.config.vision_feature_layer][:, 1:], out.pooler_output


class Heads(nn.Module):
    """Linear heads on the visual features that teach the encoder what it sees; thrown away after training."""

    def __init__(self, width: int):
        super().__init__()
        self.kind = nn.Linear(width, CLASSES)
        self.size = nn.Linear(width, len(SIZES))
        self.color = nn.Linear(width, len(COLORS))
        self.chars = nn.Linear(width, TEXT_LENGTH * len(CHARACTERS))
        self.scene = nn.Linear(width, CLS_LABELS)

    def patch_loss(self, patches: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of what each patch shows, from its features [P, N, width] and ``batch.patch_targets``."""
        kind = targets["kind"].flatten()
        rows = patches.flatten(0, 1)
        text = kind == TEXT_CLASS
        shape = (kind > 0) & (kind < TEXT_CLASS)
        colored = shape | text
        loss = F.cross_entropy(self.kind(rows).float(), kind)
        loss = loss + 0.5 * F.cross_entropy(self.color(rows[colored]).float(), targets["color"].flatten()[colored])
        loss = loss + 0.25 * F.cross_entropy(self.size(rows[shape]).float(), targets["size"].flatten()[shape])
        if bool(text.any()):  # clips and small batches may show none
            read = self.chars(rows[text]).float().view(-1, len(CHARACTERS))
            loss = loss + 0.5 * F.cross_entropy(read, targets["chars"].flatten(0, 1)[text].flatten())
        return loss

    def scene_loss(self, pooled: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy of what the whole picture shows, from the pooled CLS token [P, width]."""
        return F.binary_cross_entropy_with_logits(self.scene(pooled).float(), targets)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention over rows of pictures followed by several questions, in two kernels.

    The rows of the pictures are plainly causal, which the fast kernel does without a mask; only the last L rows, the
    text, need ``attention_mask`` (bool [B, 1, L, S], True where a key is seen). L may be 0.
    """
    text = attention_mask.shape[2]
    first = query.shape[2] - text
    out = F.scaled_dot_product_attention(
        query[:, :, :first], key[:, :, :first], value[:, :, :first], is_causal=True, scale=scaling
    )
    if text:
        asked = F.scaled_dot_product_attention(query[:, :, first:], key, value, attn_mask=attention_mask, scale=scaling)
        out = torch.cat([out, asked], 2)
    return out.transpose(1, 2).contiguous(), None
