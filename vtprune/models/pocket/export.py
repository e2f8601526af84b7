# SPDX-License-Identifier: Apache-2.0
"""Turn a training state into the folder that ``transformers`` loads.

``python -m vtprune.models.pocket.export MODEL --state DIR [--out DIR] [--unfinished]``

A state of weights alone will do, without the optimiser's moments and the training heads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import layout, qwen, vocab
from . import next as anyres
from .card import is_finished, model_card
from .data import COLORS
from .model import LOG_FILE, STATE_FILE, llava_config, read_state
from .plans import STAGES

HERE = Path(__file__).parent
GOLDEN_FILE = "golden.json"


@dataclass(frozen=True)
class Shipped:
    """How one model is written: its configuration, what writes its folder, and its golden input."""

    config: Callable[[], Any]
    write_folder: Callable[..., PreTrainedModel]
    golden_inputs: Callable[[], dict[str, Tensor]]


MODELS = {
    "pocket-llava": Shipped(llava_config, layout.write_folder, layout.golden_inputs),
    "pocket-llava-next": Shipped(anyres.next_config, anyres.write_folder, anyres.golden_inputs),
    "pocket-qwen2.5-vl": Shipped(qwen.qwen_config, qwen.write_folder, qwen.golden_inputs),
}


def read_weights(state: Path) -> dict[str, Tensor]:
    """Weights of a training state under their names in the model, bf16; the training heads are left out.

    Raises
    ------
    ValueError
        If there are none.
    """
    weights = {}
    for key, tensor in read_state(state).items():
        part, name = key.split("/", 1)
        if part == "weight" and not name.startswith("heads."):
            weights[name] = tensor
    if not weights:
        raise ValueError(f"{state} has no weights: there is no state-*.safetensors with any in it")
    return weights


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a training log.

    Raises
    ------
    ValueError
        If there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"there is no training log {path}")
    return [json.loads(line) for line in path.read_text().splitlines()]


def whole_log(name: str, state: Path) -> list[dict[str, Any]]:
    """Log of a state, after that of the stages before it if they were trained elsewhere.

    A model can go on from the weights that ship. Then its earlier stages are in the shipped log alone, whose rows
    have no name of a stage where an older version of this code wrote them.
    """
    log = read_log(state / LOG_FILE)
    stages = [stage.name for stage in STAGES[name]]
    began = next(row.get("stage", stages[0]) for row in log if row.get("event") == "start")
    # An older recipe may have had stages that are no longer known; such a log is whole.
    before = stages[: stages.index(began)] if began in stages else []
    if not before:
        return log
    earlier = takewhile(lambda row: row.get("stage", stages[0]) in before, read_log(HERE / name / LOG_FILE))
    return [*(row for row in earlier if row.get("event") != "test"), *log]


@torch.no_grad()
def golden_logits(name: str, model: PreTrainedModel) -> dict[str, float]:
    """Logits of the colour words after the fixed input; they are compared in fp32."""
    logits = model(**MODELS[name].golden_inputs()).logits[0, -1]
    return {color: float(logits[vocab.IDS[color]]) for color in COLORS}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def export(name: str, state: Path, out: Path | None = None, unfinished: bool = False) -> None:
    """Write the folder of a model.

    Parameters
    ----------
    name
        One of ``MODELS``.
    state
        Folder with a training state and its log.
    out
        Folder to write, by default the one in the package; files of the same names are replaced.
    unfinished
        Write a model whose training has not finished; its card says so.

    Raises
    ------
    ValueError
        If the training was not finished and that is not allowed, the state is of another model, or the weights do not
        fit the network.
    """
    out = out or HERE / name
    meta = json.loads((state / STATE_FILE).read_text())
    if meta["model"] != name:
        raise ValueError(f"{state} holds {meta['model']}, not {name}")
    log = whole_log(name, state)
    if not unfinished and not is_finished(log):
        raise ValueError(
            f"{state} stopped at step {meta['step']} of stage {meta['stage']!r}: train on, or give --unfinished"
        )
    shipped = MODELS[name]
    model = shipped.write_folder(out, read_weights(state), shipped.config()).eval()
    file = out / layout.WEIGHTS_FILE
    golden = {"question": layout.GOLDEN_QUESTION, "logits": golden_logits(name, model), "sha256": sha256(file)}
    layout.write_json(out / GOLDEN_FILE, golden)
    (out / LOG_FILE).write_text("".join(json.dumps(row) + "\n" for row in log))
    parameters = sum(p.numel() for p in model.parameters())
    (out / "README.md").write_text(model_card(name, log, parameters, file.stat().st_size))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the folder of a pocket model from a training state.")
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--state", type=Path, required=True, help="folder with a training state and its log")
    parser.add_argument("--out", type=Path, help="folder to write; default the one in the package")
    parser.add_argument("--unfinished", action="store_true", help="write it though training has not finished")
    args = parser.parse_args()
    try:
        export(args.model, args.state, args.out, args.unfinished)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
