# SPDX-License-Identifier: Apache-2.0
"""The network of ``pocket-llava``: its configuration, and the heads that are used in training only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from . import vocab
from .batch import CLASSES, CLS_LABELS, PATCH, PATCHES, PREFIX
from .data import CHARACTERS, COLORS, SIDE, TEXT_LENGTH

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
ATTENTION = "pocket_packed"


def llava_config(
    vision_width: int = 192, vision_layers: int = 6, vision_heads: int = 3, width: int = 256, layers: int = 6,
    heads: int = 4, ffn: int = 704,
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
            vocab_size=len(vocab.TOKENS),
            hidden_size=width,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
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


class Heads(nn.Module):
    """Linear heads on the vision tower that teach it what it sees; thrown away after training."""

    def __init__(self, width: int):
        super().__init__()
        self.kind = nn.Linear(width, CLASSES)
        self.color = nn.Linear(width, len(COLORS))
        self.chars = nn.Linear(width, TEXT_LENGTH * len(CHARACTERS))
        self.scene = nn.Linear(width, CLS_LABELS)

    def patch_loss(self, patches: Tensor, kind: Tensor, color: Tensor, chars: Tensor) -> Tensor:
        """Cross-entropy of what each patch shows, from its features [B, 576, width]."""
        shown, text = (kind > 0).flatten(), (kind == CLASSES - 1).flatten()
        rows = patches.flatten(0, 1)
        loss = F.cross_entropy(self.kind(rows).float(), kind.flatten())
        loss = loss + 0.5 * F.cross_entropy(self.color(rows[shown]).float(), color.flatten()[shown])
        read = self.chars(rows[text]).float().view(-1, len(CHARACTERS))
        return loss + 0.5 * F.cross_entropy(read, chars.flatten(0, 1)[text].flatten())

    def scene_loss(self, pooled: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy of what the whole picture shows, from the pooled CLS token [B, width]."""
        return F.binary_cross_entropy_with_logits(self.scene(pooled).float(), targets)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention over rows of one picture and several questions, in two kernels.

    The picture's 577 rows are plainly causal, which the fast kernel does without a mask; only the few text rows need
    ``attention_mask`` (bool [B, 1, L, 577 + L], True where a key is seen).
    """
    picture = F.scaled_dot_product_attention(
        query[:, :, :PREFIX], key[:, :, :PREFIX], value[:, :, :PREFIX], is_causal=True, scale=scaling
    )
    text = F.scaled_dot_product_attention(query[:, :, PREFIX:], key, value, attn_mask=attention_mask, scale=scaling)
    return torch.cat([picture, text], 2).transpose(1, 2).contiguous(), None
