# SPDX-License-Identifier: Apache-2.0
"""The folder that ``transformers`` loads: that of ``pocket-llava``, and what the others share with it.

The files are written by hand rather than by ``save_pretrained``, in the layout of transformers 4.57: newer versions
read it too, while 4.57 and 5.0 load a folder saved by newer ones with a random vision tower and only a warning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaConfig, PreTrainedModel

from . import vocab
from .batch import PATCH, PATCHES
from .data import SIDE
from .model import PIXEL_MEAN, PIXEL_STD

WEIGHTS_FILE = "model.safetensors"
MAX_BYTES = 16 * 2**20
OUTPUT = "lm_head.weight"  # tied to the embedding, so not stored
GOLDEN_QUESTION = "what color is the circle ?"

CHAT_TEMPLATE = """\
{{- '<s>' -}}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {{- '<image>' -}}
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

_RENAMED = (
    (re.compile(r"^model\.vision_tower\.(vision_model\.)?"), "vision_tower.vision_model."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.multi_modal_projector\."), "multi_modal_projector."),
)


def disk_name(name: str) -> str:
    """Name on disk of a parameter of ``pocket-llava``.

    Raises
    ------
    ValueError
        If the parameter has none.
    """
    for pattern, prefix in _RENAMED:
        if pattern.match(name):
            return pattern.sub(prefix, name)
    raise ValueError(f"no place on disk for the parameter {name!r}")


def config_dict(config: LlavaConfig) -> dict[str, Any]:
    """``config.json``, with the keys that transformers 4.57 to 5 agree on."""
    text, vision = config.text_config, config.vision_config
    special = {"pad_token_id": vocab.PAD, "bos_token_id": vocab.BOS, "eos_token_id": vocab.EOS}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": "bfloat16",
        "image_token_index": vocab.IMAGE,
        "image_seq_length": PATCHES,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "tie_word_embeddings": True,
        **special,
        "text_config": {
            "model_type": "llama",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.hidden_size // text.num_attention_heads,
            "hidden_act": "silu",
            "max_position_embeddings": text.max_position_embeddings,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            **special,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "projection_dim": vision.projection_dim,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "image_size": SIDE,
            "patch_size": PATCH,
            "hidden_act": vision.hidden_act,
            "layer_norm_eps": vision.layer_norm_eps,
        },
    }


def build_tokenizer() -> tokenizers.Tokenizer:
    """Word-level tokenizer: lower-cases, parts words and punctuation; characters read in a picture join up again."""
    unknown = vocab.SPECIALS[vocab.UNK]
    tokenizer = tokenizers.Tokenizer(models.WordLevel(dict(vocab.IDS), unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    prefix = vocab.CHARACTER_PREFIX
    # WordPiece leaves the prefix on the first token of an answer, so it is taken off last.
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix, cleanup=False), decoders.Replace(prefix, "")])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in vocab.SPECIALS])
    return tokenizer


def small_files(config: LlavaConfig) -> dict[str, Any]:
    """Name and content of the JSON files beside the weights, the tokenizer's vocabulary excepted."""
    pad, unk, bos, eos, image = vocab.SPECIALS
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    ids = {"bos_token_id": vocab.BOS, "eos_token_id": vocab.EOS, "pad_token_id": vocab.PAD}
    return {
        "config.json": config_dict(config),
        "generation_config.json": {**ids, "do_sample": False, "max_new_tokens": 8},
        "special_tokens_map.json": {**named, "additional_special_tokens": [image]},
        "tokenizer_config.json": {
            **named,
            "additional_special_tokens": [image],
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config.text_config.max_position_embeddings,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": SIDE, "width": SIDE},
            "resample": 3,
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [PIXEL_MEAN] * 3,
            "image_std": [PIXEL_STD] * 3,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": image,
            "num_additional_image_tokens": 1,
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
        },
    }


def waves(*shape: int) -> Tensor:
    """Pixels for the golden inputs, which need neither drawing nor a processor: float32 of this shape."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) / 997).float().view(shape)


def golden_inputs() -> dict[str, Tensor]:
    """A fixed input: waves for a picture, and one question.

    Returns
    -------
    dict
        ``pixel_values`` float32 [1, 3, 336, 336], ``input_ids`` and ``attention_mask`` int64 [1, 583].
    """
    ids = torch.tensor([[vocab.BOS, *[vocab.IMAGE] * PATCHES, *vocab.encode(GOLDEN_QUESTION)]])
    return {"pixel_values": waves(1, 3, SIDE, SIDE), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write_json(path: Path, content: Any) -> None:
    """Write a file such as ``transformers`` reads."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_files(
    out: Path, files: Mapping[str, Any], template: str, tokenizer: tokenizers.Tokenizer, weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Write the folder of a model, and load it again.

    Parameters
    ----------
    out
        Folder to write; files of the same names are replaced.
    files
        Name and content of the JSON files.
    template
        The chat template.
    tokenizer
        The tokenizer.
    weights
        Under their names on disk, in any dtype; stored in bf16.

    Returns
    -------
    PreTrainedModel
        What the folder loads as, in fp32.

    Raises
    ------
    ValueError
        If the tokenizer has another number of words than the model, the file of the weights is larger than 16 MiB, or
        the folder does not load cleanly, because weights are missing or of another shape.
    """
    words = files["config.json"]["text_config"]["vocab_size"]
    if tokenizer.get_vocab_size() != words:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} words, the model {words}")
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_json(out / name, content)
    (out / "chat_template.jinja").write_text(template)
    tokenizer.save(str(out / "tokenizer.json"))
    stored = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in weights.items()}
    file = out / WEIGHTS_FILE
    save_file(stored, file, metadata={"format": "pt"})
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than {MAX_BYTES}")
    model, info = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"the written folder does not load cleanly: {wrong}")
    return model


def write_folder(out: Path, weights: Mapping[str, Tensor], config: LlavaConfig) -> PreTrainedModel:
    """Write the folder of ``pocket-llava``, its model card and log excepted.

    Parameters
    ----------
    out
        Folder to write; files of the same names are replaced.
    weights
        All parameters under their names in a ``LlavaForConditionalGeneration``, in any dtype. The output layer may be
        left out, as it is tied to the embedding.
    config
        Configuration of that model.

    Returns
    -------
    PreTrainedModel
        What the folder loads as, in fp32.

    Raises
    ------
    ValueError
        As :func:`write_files`, or if a name has no place on disk.
    """
    stored = {disk_name(name): weight for name, weight in weights.items() if name != OUTPUT}
    return write_files(out, small_files(config), CHAT_TEMPLATE, build_tokenizer(), stored)
