# SPDX-License-Identifier: Apache-2.0
"""Stock processors for the tiny models, built without files: the tokens are those of `tiny`."""

from __future__ import annotations

from typing import Any

import tiny
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

SPECIALS = {tiny.PAD: "<pad>", tiny.BOS: "<s>", 2: "<unk>", tiny.IMAGE: "<image>", tiny.VIDEO: "<video>"}
SPECIALS |= {tiny.VISION_START: "<start>", tiny.VISION_END: "<end>"}
TEMPLATE = """\
{%- for message in messages -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{- ' ' + part['text'] + ' ' -}}
{%- else -%}{{- BEFORE + '<' + part['type'] + '>' + AFTER -}}{%- endif -%}
{%- endfor -%}{%- endfor -%}"""


def processor(family: str) -> Any:
    """The processor of a model of `tiny.build`; words are ``w5`` to ``w109``."""
    words = {f"w{i}": i for i in range(tiny.VOCABULARY) if i not in SPECIALS}
    inner = tokenizers.Tokenizer(models.WordLevel(words | {v: k for k, v in SPECIALS.items()}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=[SPECIALS[i] for i in SPECIALS if i >= tiny.IMAGE],
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",  # the runner must not rely on it
    )
    if family in tiny.QWEN:
        template = TEMPLATE.replace("BEFORE", "'<start>'").replace("AFTER", "'<end>'")
        pixels = dict(patch_size=14, size={"shortest_edge": 28 * 28, "longest_edge": 40 * 28 * 28})
        kind = "Qwen2VL" if family == "qwen2_vl" else "Qwen2_5_VL"
        return getattr(transformers, f"{kind}Processor")(
            image_processor=transformers.Qwen2VLImageProcessor(**pixels),
            tokenizer=tokenizer,
            video_processor=transformers.Qwen2VLVideoProcessor(**pixels, do_sample_frames=False),
            chat_template=template,
        )
    template = TEMPLATE.replace("BEFORE", "''").replace("AFTER", "''")
    size = {"height": tiny.CROP, "width": tiny.CROP}
    common = dict(tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=template)
    common |= dict(image_token="<image>", num_additional_image_tokens=1)
    if family == "llava":
        images = transformers.CLIPImageProcessor(size=size, do_center_crop=False)
        return transformers.LlavaProcessor(image_processor=images, **common)
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": tiny.CROP}, crop_size=size, image_grid_pinpoints=tiny.PINPOINTS
    )
    return transformers.LlavaNextProcessor(image_processor=images, **common)
