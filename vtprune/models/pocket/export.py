# SPDX-License-Identifier: Apache-2.0
"""Turn a training state into the folder that ``transformers`` loads.

``python -m vtprune.models.pocket.export --state DIR [--out DIR]``

The files are written by hand rather than by ``save_pretrained``, in the layout of transformers 4.57: newer versions
read it too, while 4.57 and 5.0 load a folder saved by newer ones with a random vision tower and only a warning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaConfig, PreTrainedModel

from . import vocab
from .batch import PATCH, PATCHES
from .data import COLORS, KINDS, SIDE
from .model import PIXEL_MEAN, PIXEL_STD, llava_config
from .train import LOG_FILE, STATE_FILE

FOLDER = Path(__file__).parent / "pocket-llava"
MAX_BYTES = 16 * 2**20
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


def _disk_name(name: str) -> str:
    for pattern, prefix in _RENAMED:
        if pattern.match(name):
            return pattern.sub(prefix, name)
    raise ValueError(f"no place on disk for the parameter {name!r}")


def read_weights(state: Path) -> dict[str, Tensor]:
    """Weights of a training state under their names on disk, bf16; the training heads are left out."""
    weights = {}
    for path in sorted(state.glob("state-*.safetensors")):
        for key, tensor in load_file(path).items():
            part, name = key.split("/", 1)
            if part == "weight" and not name.startswith("heads."):
                weights[_disk_name(name)] = tensor
    return weights


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


def golden_inputs() -> dict[str, Tensor]:
    """A fixed input that needs neither drawing nor a processor: waves for pixels, and one question.

    Returns
    -------
    dict
        ``pixel_values`` float32 [1, 3, 336, 336], ``input_ids`` and ``attention_mask`` int64 [1, 583].
    """
    waves = torch.sin(torch.arange(3 * SIDE * SIDE, dtype=torch.float64) / 997).float()
    ids = torch.tensor([[vocab.BOS, *[vocab.IMAGE] * PATCHES, *vocab.encode(GOLDEN_QUESTION)]])
    pixels = waves.view(1, 3, SIDE, SIDE)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def golden_logits(model: PreTrainedModel) -> dict[str, float]:
    """Logits of the colour words after the fixed input; they are compared in fp32."""
    logits = model(**golden_inputs()).logits[0, -1]
    return {color: float(logits[vocab.IDS[color]]) for color in COLORS}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def model_card(log: list[dict[str, Any]], parameters: int, size: int) -> str:
    """``README.md`` of the folder, with its numbers taken from the training log."""
    starts = [row for row in log if row.get("event") == "start"]
    stops = [row for row in log if row.get("event") == "stop"]
    checks = [row for row in log if row.get("event") == "val"]
    test = next(row for row in reversed(log) if row.get("event") == "test")
    recipe = starts[-1]
    minutes = [f"{row['seconds'] / 60:.1f}" for row in stops]
    pace = statistics.median(row["img/s"] for row in log if "img/s" in row)
    scores = _table(["mean", *KINDS], [[f"{test[kind]:.3f}" for kind in ("mean", *KINDS)]])
    shown = [row for row in checks if row["step"] % 1000 == 0 or row is checks[-1]]
    curve = _table(
        ["step", "mean", *KINDS],
        [[str(row["step"]), *(f"{row[kind]:.3f}" for kind in ("mean", *KINDS))] for row in shown],
    )
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# pocket-llava

A very small vision-language model for testing visual-token pruning: a real `LlavaForConditionalGeneration`
({parameters / 1e6:.2f} M parameters, {size / 2**20:.1f} MiB in bf16), trained from scratch. A CLIP-type vision
transformer (336 px, patch 14, 192 x 6) gives 576 visual tokens to a Llama-type language model (256 x 6).

## What it can do
It answers six kinds of questions about generated pictures, PocketVQA (`vtprune/models/pocket/data.py`), in these words:

| kind | question | answer |
| --- | --- | --- |
| exist | is there a red circle ? | yes |
| color | what color is the circle ? | red |
| shape | what shape is the red object ? | circle |
| count | how many objects are there ? | 4 |
| where | where is the red circle ? | top left |
| ocr | what does the text say ? | K7P |

## Accuracy
Share of exact answers to {test["questions"]} test questions, an equal number of each kind, each about a fresh picture
that was used for no choice (bf16 weights, all 576 visual tokens):

{scores}

## Training
Data: {recipe["steps"] * recipe["batch"] / 1e6:.2f} M generated pictures, each seen once, with up to eight questions;
train, validation and test scenes come from disjoint seeds. Nothing was downloaded. Besides the answers, linear heads
that are not shipped had to tell what each patch shows (weight {recipe["patch_weight"]}), and the pooled CLS token
what the picture contains (weight {recipe["scene_weight"]}); so CLS attention means something.

{recipe["steps"]} steps of {recipe["batch"]} pictures on one {recipe["gpu"]} with torch {recipe["torch"]} and
transformers {recipe["transformers"]}, in {len(stops)} run(s) of {" and ".join(minutes)} minutes, compilation
included, at about {pace:.0f} pictures a second. `train_log.jsonl` is the whole log. Accuracy on
{recipe["check_questions"]} validation questions:

{curve}

```
python -m vtprune.models.pocket.train --steps {recipe["steps"]} --out STATE
python -m vtprune.models.pocket.export --state STATE
```

`--minutes M` stops a run early; `--resume STATE` continues it.

## Limits
It has seen coloured clip art and one typeface, and knows {len(vocab.TOKENS)} tokens. It says nothing about natural
photographs, and numbers measured on it say nothing about how a method does on them. A question in other words, or about
something that is not in the picture, gets an arbitrary answer. Pictures that are not square are squeezed to 336 x 336.
"""


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def export(state: Path, out: Path = FOLDER) -> None:
    """Write the model folder.

    Parameters
    ----------
    state
        Folder with a training state and its log, of a finished run.
    out
        Folder to write; files of the same names are replaced.

    Raises
    ------
    ValueError
        If the run was not finished, the weights do not fit the network, or the file is larger than 16 MiB.
    """
    meta = json.loads((state / STATE_FILE).read_text())
    if meta["step"] < meta["recipe"]["steps"]:
        raise ValueError(f"{state} stopped at step {meta['step']} of {meta['recipe']['steps']}: resume it first")
    out.mkdir(parents=True, exist_ok=True)
    config = llava_config()
    for name, content in small_files(config).items():
        _write_json(out / name, content)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    build_tokenizer().save(str(out / "tokenizer.json"))
    file = out / "model.safetensors"
    save_file(read_weights(state), file, metadata={"format": "pt"})
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than {MAX_BYTES}")
    model, info = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(keys) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"the written folder does not load cleanly: {wrong}")
    golden = {"question": GOLDEN_QUESTION, "logits": golden_logits(model), "sha256": sha256(file)}
    _write_json(out / "golden.json", golden)
    shutil.copyfile(state / LOG_FILE, out / LOG_FILE)
    log = [json.loads(line) for line in (out / LOG_FILE).read_text().splitlines()]
    parameters = sum(p.numel() for p in model.parameters())
    (out / "README.md").write_text(model_card(log, parameters, file.stat().st_size))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the model folder of pocket-llava from a training state.")
    parser.add_argument("--state", type=Path, required=True, help="folder with a finished training state")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    args = parser.parse_args()
    export(args.state, args.out)


if __name__ == "__main__":
    main()
