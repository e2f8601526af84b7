# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL: Qwen2.5-VL without windows, with DeepStack and with a timestamp before every frame of a video.

Quirks: features of several encoder layers are added to the visual rows after the first decoder layers (DeepStack), so
they are gathered with the rows, and nothing can be dropped inside the language model before the last of them is in;
where a method merges tokens, these features stay those of the row that the merged one is named after. A video is one
video, but its frames are runs of placeholders apart, with timestamps in words between them: those are text, they stay,
and each frame keeps its positions. Newer transformers refuse pictures without ``mm_token_type_ids``.
"""

from __future__ import annotations

from .qwen_vl import QwenVL


class Qwen3VL(QwenVL):
    """Qwen3-VL: DeepStack, and times between frames."""

    model_types = ("qwen3_vl",)
    label = "Qwen3-VL"
    usual_layers = (36, 2)
