# SPDX-License-Identifier: Apache-2.0
"""A model spread over two GPUs by accelerate, pruned: does it answer as it does on one, and how fast?

    python -m benchmarks.two_gpus
    python -m benchmarks.two_gpus --devices cpu cpu      # the hooks alone, on any machine

The decoder is cut in half: encoder, projector and the first layers on one card, the rest and the head on the other, so
that pruning at the projector happens on the first card, and after a layer of the upper half on the second (a head that
is tied to the embeddings stays with them). Every line says how many greedy tokens equal those of the same weights on
one card, and the largest difference of the logits from which the first was drawn, as a part of the largest logit.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import vtprune
from vtprune.eval.runner import current_commit as commit
from vtprune.models import find_family

#: Label, method, options; `layer` is filled in with one in the upper half.
METHODS: tuple[tuple[str, str | None, dict[str, Any]], ...] = (
    ("dense", None, {}),
    ("norm", "norm", {}),
    ("divprune", "divprune", {}),
    ("idpruner", "idpruner", {}),
    ("fastv above", "fastv", {"layer": -1}),
)
STEPS = 16


def halves(family: Any, first: str, second: str) -> dict[str, str]:
    """Where accelerate is to put what: everything on the first device, but for the upper layers and the head."""
    names = {id(module): name for name, module in family.model.named_modules()}
    layers = family.lm.layers
    place: dict[str, str] = {}
    for module in family.inner.children():
        if module is not family.lm:
            place[names[id(module)]] = first
    for name, _ in family.inner.named_parameters(recurse=False):  # LLaVA-NeXT's newline
        place[f"{names[id(family.inner)]}.{name}"] = first
    for name, module in family.lm.named_children():
        path = names[id(module)]
        if module is layers:
            place |= {f"{path}.{i}": first if i < len(layers) // 2 else second for i in range(len(layers))}
        else:
            place[path] = second if name == "norm" else first
    tied = family.model.get_output_embeddings().weight is family.model.get_input_embeddings().weight
    place["lm_head"] = first if tied else second
    return place


def answer(model: Any, inputs: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, -STEPS:].tolist(), out.logits[0][0].float().cpu()


@torch.inference_mode()
def prefill_ms(model: Any, inputs: dict[str, Any]) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        logits = model(**inputs, use_cache=True, logits_to_keep=1).logits
        logits.flatten()[0].item()  # waits for the device that comes last
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def load(name: str, device: str) -> tuple[Any, dict[str, Any]]:
    """A model and a prompt with one picture."""
    from PIL import Image

    from vtprune.models.loading import build_inputs

    picture = Image.radial_gradient("L").resize((336, 336)).convert("RGB")
    model, processor = vtprune.load(name, device=device, dtype=torch.float32)
    return model, dict(build_inputs(model, processor, picture, "what is in the picture ?"))


def compare(name: str, devices: tuple[str, str], keep: float) -> list[dict[str, Any]]:
    import accelerate

    model, inputs = load(name, devices[0])
    family = find_family(model)
    depth = len(family.lm.layers)
    runs: dict[str, list[tuple[list[int], torch.Tensor, float]]] = {label: [] for label, _, _ in METHODS}
    for spread in (False, True):
        if spread:
            place = halves(family, *devices)
            accelerate.dispatch_model(model, place, main_device=devices[0], force_hooks=True)
        for label, method, options in METHODS:
            options = {key: (depth * 3 // 4 if key == "layer" else value) for key, value in options.items()}
            with vtprune.using(model, method, **({"keep": keep, **options} if method else {})):
                runs[label].append((*answer(model, inputs), prefill_ms(model, inputs)))
    rows = []
    for label, ((tokens, logits, alone), (found, spread_logits, both)) in runs.items():
        rows.append(
            {
                "model": name,
                "method": label,
                "keep": keep if label != "dense" else 1,
                "tokens_equal": sum(a == b for a, b in zip(tokens, found, strict=True)),
                "tokens": STEPS,
                "logit_gap": f"{float((logits - spread_logits).abs().max() / logits.abs().max()):.2g}",
                "one_device_ms": round(alone, 2),
                "two_devices_ms": round(both, 2),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pocket-llava", "pocket-llava-next", "pocket-qwen2.5-vl"])
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"])
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(arguments)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    out = given.out or Path(__file__).parent / "results" / f"two-gpus-{where.lower().replace(' ', '-')}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "devices": f"{len(set(given.devices))} x {where}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": given.commit or commit(),
    }
    rows = [row for name in given.models for row in compare(name, tuple(given.devices), given.keep)]
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*about, *rows[0]])
        writer.writeheader()
        writer.writerows({**about, **row} for row in rows)
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
