# SPDX-License-Identifier: Apache-2.0
"""Models that accelerate spreads out: weights come from main memory or from disk, layer by layer, under its hooks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conformance.helpers import KEEP, TEST_PRUNERS, generate, same
from torch import nn

import vtprune
from vtprune import registry

accelerate = pytest.importorskip("accelerate")
#: The stock LLaVA-OneVision and Idefics3 themselves fail when all of their weights are offloaded.
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "mistral3")


@pytest.fixture(autouse=True)
def _test_only_pruners() -> Iterator[None]:
    registry.register("test-probe")(TEST_PRUNERS["test-probe"])
    yield
    registry._METHODS.pop("test-probe", None)


STAGES: dict[str, Any] = {
    "norm": {},
    "divprune": {},
    "fastv": {"layer": 2},
    "zoo": {"m": 4},
}


def spread(family: str, how: str, folder: Path) -> nn.Module:
    """A model whose weights are nowhere until a module runs; inputs and results stay where they are."""
    model = tiny.build(family)
    if how == "memory":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    where = {p.device.type for p in model.parameters()}
    assert where == {"meta"}, "nothing was offloaded, so nothing is tested"
    return model


@pytest.mark.parametrize("how", ["memory", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_models_are_pruned_like_others(family: str, how: str, tmp_path: Path) -> None:
    plain, model = tiny.build(family), spread(family, how, tmp_path)
    batch = tiny.collate(tiny.mixed(plain))
    for method, options in STAGES.items():
        if method == "zoo":  # computes with the projector's weights, which are not there
            with pytest.raises(vtprune.errors.UnsupportedModelError):
                vtprune.apply(model, method, keep=KEEP, **options)
            continue
        with vtprune.apply(plain, method, keep=KEEP, **options):
            expected = generate(plain, batch, 3)
        with vtprune.apply(model, method, keep=KEEP, **options) as handle:
            found = generate(model, batch, 3)
            assert handle.report().tokens_out < handle.report().tokens_in
        assert all(same(a, b) for a, b in zip(found, expected, strict=True)), method
    with torch.no_grad():
        assert same(model(**batch).logits, plain(**batch).logits), "after removal the model is what it was"


def test_weights_of_the_inner_models_own_are_there_when_generate_encodes_pictures(tmp_path: Path) -> None:
    """LLaVA-NeXT's newline: the stock generate() of newer transformers fails for want of it."""
    plain, model = tiny.build("llava_next"), spread("llava_next", "disk", tmp_path)
    sample = tiny.prompt(plain, 2)
    for method, keep in (("norm", KEEP), ("norm", 1.0)):
        with vtprune.apply(plain, method, keep=keep):
            expected = generate(plain, sample, 2)
        with vtprune.apply(model, method, keep=keep) as handle:
            found = generate(model, sample, 2)
            assert (handle.report().tokens_out < handle.report().tokens_in) == (keep < 1)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True)), method
    assert all(p.is_meta for p in model.parameters()), "weights stayed where they were brought"
    with torch.no_grad():
        assert same(model(**sample).logits, plain(**sample).logits)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "qwen3_vl", "idefics3", "mistral3"])
def test_encoder_outputs_that_were_copied_on_the_way_are_known_again(family: str) -> None:
    """What accelerate's hooks do between devices; newer transformers encode in generate(), before the forward."""
    model = tiny.build(family)
    picture = tiny.Image(1, 1) if family == "internvl" and not tiny.takes(model, "mm_encoder_outputs") else None
    samples = [tiny.sample(model, [3, picture, 4], 1) if picture else tiny.prompt(model, n, n) for n in (2, 1)]
    batch = tiny.collate(samples)

    def copies(_m: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        made = kwargs.get("mm_encoder_outputs") or {}
        clone = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, dict(made))
        return args, {**kwargs, "mm_encoder_outputs": clone} if made else kwargs

    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "output_scores": True}
    options["return_dict_in_generate"] = True
    with vtprune.apply(model, "test-probe", keep=KEEP):
        expected = model.generate(**batch, **options)
    handle = model.register_forward_pre_hook(copies, with_kwargs=True)
    with vtprune.apply(model, "test-probe", keep=KEEP):
        found = model.generate(**batch, **options)
    handle.remove()
    assert same(found.sequences, expected.sequences)
    assert same(found.sequences_scores, expected.sequences_scores)


def test_encoder_outputs_of_other_pictures_are_refused_all_the_same() -> None:
    model = tiny.build("llava")
    if not tiny.takes(model, "mm_encoder_outputs"):
        return
    first, second = tiny.prompt(model, 1, 1), tiny.prompt(model, 1, 2)
    stranger = model.model.get_image_features(first["pixel_values"], return_dict=True)
    rest = {k: v for k, v in second.items() if k != "pixel_values"}
    with vtprune.apply(model, "norm", keep=KEEP):
        model.model.get_image_features(second["pixel_values"], return_dict=True)
        with pytest.raises(vtprune.errors.InputError, match="before vtprune was applied"):
            model(**rest, mm_encoder_outputs={"image": stranger})


def test_tokens_move_as_a_whole() -> None:
    """At a layer on another device, everything that a pruner sees must be there."""
    model = tiny.build("llava")
    tokens = vtprune.encode(model, tiny.prompt(model, 2))
    assert tokens.to(tokens.device) is tokens and tokens.probes
    moved = tokens.to(torch.device("meta"))
    own = [v for k, v in vars(moved).items() if isinstance(v, torch.Tensor) and k != "vocabulary"]
    assert len(own) >= 5 and {v.device.type for v in [*own, *moved.probes.values()]} == {"meta"}
    assert moved.vocabulary is tokens.vocabulary and moved.seqlens == tokens.seqlens
