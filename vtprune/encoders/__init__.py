# SPDX-License-Identifier: Apache-2.0
"""Vision transformers of timm and open_clip on their own: patch tokens are dropped or merged between two blocks.

`vtprune.apply` finds them by itself; the same methods serve as in front of a language model.
"""

from .vit import Encoder, find_encoder

__all__ = ["Encoder", "find_encoder"]
