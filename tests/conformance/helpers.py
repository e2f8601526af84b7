# SPDX-License-Identifier: Apache-2.0
"""Shared by the conformance tests: test-only pruners, a spy on what was chosen, and the comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import tiny
import torch
import transformers
from helpers import Declared
from torch import Tensor, nn

import vtprune
from vtprune.registry import Pruner
from vtprune.tokens import PRE_PROJECTOR, PROJECTOR, Probe, Selection, Stage, VisualTokens

from . import flash_contract
from .reference import Kept, Prompt, Reference

FLASH = flash_contract.NAME
ATTENTIONS = ("sdpa", "eager", FLASH)
METHODS = ("random", "grid", "norm", "divprune", "idpruner")
FP32, FP64, LOOSE = 2e-5, 1e-10, 1e-4
KEEP = 0.4
#: A token that greedy decoding never writes: some modes of generate() need an end token.
NEVER = tiny.VOCABULARY - 1
#: Visual tokens of the three pictures that `tiny.pictures` takes turns with; AnyRes newlines not counted.
FAMILIES_COUNTS = {
    "llava": (16, 16, 16),
    "llava_next": (48, 32, 56),
    "qwen2_vl": (24, 6, 10),
    "qwen2_5_vl": (24, 6, 15),
}


#: True where generate() works with lengths of the cache: older transformers (5.0, 4.57) want the whole history again on
#: a filled cache and cuts it by the cache's length, and crops rejected candidates to an absolute length. Both cannot be
#: right on a pruned cache, so there the engine must refuse.
COUNTS_THE_CACHE = hasattr(transformers.GenerationMixin, "_get_initial_cache_position")


@dataclass
class LayerPruner(Declared):
    """Test-only: drops at several places, by a fixed random direction in whatever space the stage shows it."""

    keeps: dict[int | None, float] = field(default_factory=lambda: {1: 0.5})

    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer, keep) for layer, keep in self.keeps.items())

    def score(self, tokens: VisualTokens) -> Tensor:
        direction = torch.randn(tokens.features.shape[-1], generator=torch.Generator().manual_seed(3))
        return tokens.features.detach().float() @ direction.to(tokens.device)


@dataclass
class FailingPruner(Declared):
    """Test-only: raises inside `select`, at a stage of choice, as often as it is told to."""

    layer: int | None = None
    failures: int = 1

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer),)

    def select(self, tokens: VisualTokens, budget: vtprune.Budget, stage: Stage = PROJECTOR) -> Selection:
        if self.failures > 0:
            self.failures -= 1
            raise ZeroDivisionError("told to fail")
        return super().select(tokens, budget, stage)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.features.detach().float().norm(dim=-1)


@dataclass
class ProbePruner(Declared):
    """Test-only: chooses by the rows before the projector, which must be those of the token."""

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset({PRE_PROJECTOR})

    def score(self, tokens: VisualTokens) -> Tensor:
        raw = tokens.probes[PRE_PROJECTOR].float()
        direction = torch.randn(raw.shape[1], generator=torch.Generator().manual_seed(4))
        return (raw @ direction.to(raw.device)).view(len(tokens.source), -1).mean(1)


TEST_PRUNERS = {"test-layers": LayerPruner, "test-failing": FailingPruner, "test-probe": ProbePruner}


@dataclass
class Record:
    """One call of a pruner's `select`."""

    layer: int | None
    tokens: VisualTokens
    selection: Selection

    @property
    def kept_source(self) -> Tensor:
        return self.tokens.source[self.selection.index]


@contextmanager
def spy(method: str) -> Iterator[list[Record]]:
    """Record what `method` chooses, call after call."""
    cls = vtprune.methods()[method]
    original = cls.select
    own = "select" in vars(cls)
    records: list[Record] = []

    def select(self: Pruner, tokens: VisualTokens, budget: vtprune.Budget, stage: Stage = PROJECTOR) -> Selection:
        selection = original(self, tokens, budget, stage)
        records.append(Record(stage.layer, tokens, selection))
        return selection

    cls.select = select  # type: ignore[method-assign]
    try:
        yield records
    finally:
        if own:
            cls.select = original  # type: ignore[method-assign]
        else:
            del cls.select


def placeholder_mask(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.isin(ids, torch.tensor(tiny.placeholders(model), device=ids.device))


def first_call(records: Sequence[Record]) -> dict[int | None, Record]:
    """The stages of the first prefill."""
    stages: dict[int | None, Record] = {}
    for record in records:
        if record.layer in stages:
            break
        stages[record.layer] = record
    assert stages, "the pruner was never asked"
    return stages


def slot_masks(model: nn.Module, inputs: tiny.Inputs, records: Sequence[Record]) -> dict[int | None, Tensor]:
    """Per stage of the first prefill, the slots of the batch that stay, ``[B, L]`` bool (padding counts as kept)."""
    placeholder = placeholder_mask(model, inputs["input_ids"])
    masks = {}
    for layer, record in first_call(records).items():
        stays = torch.ones(int(placeholder.sum()), dtype=torch.bool, device=placeholder.device)
        stays[record.tokens.source] = False
        stays[record.kept_source] = True
        masks[layer] = torch.ones_like(placeholder).masked_scatter(placeholder, stays)
    return masks


def kept_of(model: nn.Module, inputs: tiny.Inputs, records: Sequence[Record]) -> list[Kept]:
    """`slot_masks`, sample by sample and without the padding."""
    masks = slot_masks(model, inputs, records)
    valid = inputs["attention_mask"].bool()
    return [{layer: mask[b][valid[b]] for layer, mask in masks.items()} for b in range(len(valid))]


def all_kept(prompt: Prompt) -> Kept:
    return {None: torch.ones_like(prompt.placeholder)}


@cache
def twin(family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> nn.Module:
    """An untouched model, built once; never hook it."""
    return tiny.build(family, attention, dtype)


def reference(family: str, dtype: torch.dtype = torch.float32) -> Reference:
    return Reference(twin(family, dtype))


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a - b).abs().max()) if a.numel() else 0.0


def assert_close(a: Tensor, b: Tensor, tolerance: float, what: str = "") -> None:
    difference = error(a, b)
    assert difference <= tolerance, f"{what or 'tensors'} differ by {difference:.3g} > {tolerance:.0e}"
    assert not math.isnan(difference), f"{what or 'tensors'} hold NaN"


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


def hooks(model: nn.Module) -> dict[str, tuple]:
    """All hooks and instance-level patches of all submodules: equal before and after means that nothing was left."""
    tables = [name for name in vars(nn.Module()) if "_hooks" in name]
    state = {}
    for name, module in model.named_modules():
        patched = tuple(sorted(k for k in vars(module) if callable(vars(module)[k]) and k in dir(type(module))))
        state[name] = (*(tuple(getattr(module, table, ())) for table in tables), patched, type(module))
    return state


@torch.no_grad()
def forward_error(
    model: nn.Module, ref: Reference, samples: Sequence[tiny.Inputs], batch: tiny.Inputs, method: str, **call: Any
) -> float:
    """Largest difference between the restored logits of a pruned batch and the reference, over all kept slots.

    The caller has applied `method` with hidden states restored to the length of the input.
    """
    positions = call.pop("positions", "original")
    with spy(method) as records:
        logits = model(**batch, **call).logits
    kept = kept_of(model, batch, records)
    valid = batch["attention_mask"].bool()
    worst = 0.0
    assert logits.shape[:2] == batch["input_ids"].shape, "logits must come back at the length of the input"
    for b, sample in enumerate(samples):
        run = ref.run(ref.prompt(sample), kept[b], positions=positions)
        rows = logits[b][valid[b]]
        worst = max(worst, error(rows[run.slots], run.logits))
    return worst


@torch.no_grad()
def generate(model: nn.Module, inputs: tiny.Inputs, steps: int = 5, **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens ``[B, steps]`` and the raw logits they were drawn from ``[B, steps, V]``; not for beams."""
    out = model.generate(
        **inputs,
        **{"max_new_tokens": steps, "do_sample": False, **options},
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, -steps:], torch.stack(out.logits, 1)


def generation_error(
    model: nn.Module,
    ref: Reference,
    samples: Sequence[tiny.Inputs],
    batch: tiny.Inputs,
    method: str,
    steps: int = 5,
    positions: str = "original",
    **options: Any,
) -> float:
    """Largest difference of the logits to recomputation without a cache; infinite if a token differs."""
    with spy(method) as records:
        tokens, logits = generate(model, batch, steps, **options)
    kept = kept_of(model, batch, records)
    worst = 0.0
    for b, sample in enumerate(samples):
        expected, expected_logits = ref.greedy(ref.prompt(sample), kept[b], steps, positions=positions)
        worst = max(worst, error(logits[b], expected_logits))
        if tokens[b].tolist() != expected:
            return math.inf
    return worst


@cache
def most_images_for_beams(family: str) -> int:
    """How many pictures per prompt the *stock* generate() gets right when it repeats prompts for beams or samples.

    Older transformers (5.17 and before) repeat LLaVA's pictures one by one, so that beams of a prompt with two see the
    first picture twice. What the stock model gets wrong by itself cannot be asked of it pruned.
    """
    plain, ref = twin(family), reference(family)
    sample = tiny.prompt(plain, 2, seed=1)
    with torch.no_grad():
        out = plain.generate(
            **sample, max_new_tokens=3, num_beams=2, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
    tokens, score = ref.beam(ref.prompt(sample), {}, 3, 2)
    right = out.sequences[0, -3:].tolist() == tokens and abs(float(out.sequences_scores[0]) - score) <= LOOSE
    return 2 if right else 1


@torch.no_grad()
def manual_decode(
    model: nn.Module,
    inputs: tiny.Inputs,
    steps: int,
    mask: bool = False,
    positions: Callable[[int], Tensor] | None = None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A decode loop as users write it by hand: prefill, then one token at a time with the cache.

    Parameters
    ----------
    mask
        Pass the attention mask of the *unpruned* sequence, grown by one column a step; else pass none.
    positions
        Step -> `position_ids` to pass; None passes none.
    tokens
        ``[B, steps]`` to feed instead of the greedy choice.
    """
    out = model(**inputs, use_cache=True)
    cache, grown = out.past_key_values, inputs["attention_mask"]
    last = grown.shape[1] - 1 - grown.flip(1).argmax(1)
    logits = [out.logits[torch.arange(len(last)), last]]
    chosen: list[Tensor] = []
    for step in range(steps):
        chosen.append(logits[-1].argmax(-1) if tokens is None else tokens[:, step])
        if step == steps - 1:
            break
        grown = torch.cat([grown, torch.ones_like(grown[:, :1])], 1)
        extra: dict[str, Any] = {"attention_mask": grown} if mask else {}
        if positions is not None:
            extra["position_ids"] = positions(step)
        out = model(input_ids=chosen[-1][:, None], past_key_values=cache, use_cache=True, **extra)
        cache = out.past_key_values
        logits.append(out.logits[:, -1])
    return torch.stack(chosen, 1), torch.stack(logits, 1)


def cache_lengths(cache: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


@contextmanager
def later_hook(module: nn.Module, change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Change the keyword arguments of a module after everybody else's hooks: this is how the tests put bugs in."""

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        change(kwargs)
        return args, kwargs

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _rope_positions(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return kwargs["position_ids"] if "position_ids" in kwargs else args[1]


@contextmanager
def rope_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the position ids that the decoder's rotary embedding is given."""
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(_rope_positions(args, kwargs).clone())

    handle = tiny.decoder(model).rotary_emb.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def rope_bug(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the position ids that the decoder's rotary embedding is given, after everybody else's hooks."""

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        changed = change(_rope_positions(args, kwargs))
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": changed}
        return (args[0], changed, *args[2:]), kwargs

    handle = tiny.decoder(model).rotary_emb.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
