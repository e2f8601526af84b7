# SPDX-License-Identifier: Apache-2.0
"""What one forward is doing: the configuration it runs under (`Job`) and what has happened so far (`Call`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..budget import Budget, Pools
from ..config import PruneConfig
from ..errors import VTPruneError
from ..models.base import Encoding
from ..registry import Pruner, choose
from ..tokens import Probe, Selection, Stage, VisualTokens
from . import positions as pos
from .prefill import Pack
from .report import Trace

if TYPE_CHECKING:
    from .entry import Entry
    from .fetched import Fetched
    from .reversible import Attending


class Encoded(Exception):
    """Raised by the engine itself to stop a forward before the language model; carries the tokens."""

    def __init__(self, tokens: VisualTokens) -> None:
        self.tokens = tokens


@dataclass
class Job:
    """A configuration made ready for one model; `probes` are the encoder's, `layer_probes` the language model's."""

    config: PruneConfig
    pruner: Pruner
    budget: Budget
    stages: tuple[Stage, ...]
    probes: frozenset[Probe]
    layer_probes: frozenset[Probe]
    trusted: bool = False  # its first selection was checked pool by pool

    @functools.cached_property
    def written(self) -> str:
        """The configuration in words: the same for jobs that do the same."""
        return self.config.to_json()

    def budget_at(self, stage: Stage) -> Budget:
        return self.pruner.stage_budget(self.budget, stage)

    @property
    def projector_stage(self) -> Stage | None:
        return next((s for s in self.stages if s.layer is None), None)

    @property
    def layer_stages(self) -> dict[int, Stage]:
        """Stages inside the language model, by the layer whose input, or attention, they prune."""
        return {s.layer + 1: s for s in self.stages if s.layer is not None}

    def keeps_everything(self, tokens: VisualTokens) -> bool:
        """True where no image can lose a token."""
        budgets = [self.budget_at(s) for s in self.stages]
        if all(isinstance(b.keep, float) and b.keep == 1.0 for b in budgets):
            return True
        if self.pruner.adaptive or not tokens.num_images:
            return False
        return all(pools.lens == pools.counts for pools in (b.pools(tokens) for b in budgets))

    @property
    def reads_question(self) -> bool:
        """Whether what is kept depends on the text at the end of the prompt."""
        return self.pruner.query_aware or any(probe.name != "hidden" for probe in self.layer_probes)

    def select(
        self,
        tokens: VisualTokens | Callable[[], VisualTokens],
        stage: Stage,
        batch: int,
        graph: Callable[[], tuple[Selection, np.ndarray] | None] | None = None,
    ) -> tuple[Selection, np.ndarray]:
        """Let the pruner choose; also kept tokens per sample ``[batch]`` as host numbers.

        These come from the budget; for adaptive methods they come from the selection, which is one host sync.

        Parameters
        ----------
        tokens
            Or what makes them.
        graph
            Does the same as a CUDA graph, or returns None where it cannot.
        """
        if graph is not None and (replayed := graph()) is not None:
            return replayed
        if callable(tokens):
            tokens = tokens()
        budget = self.budget_at(stage)
        with torch.no_grad():
            selection = choose(self.pruner, tokens, budget, stage)
        if self.pruner.adaptive:
            sample = np.asarray([tokens.image_sample[i] for i in tokens.seg_image], np.int64)
            kept = np.diff(selection.cu_seqlens.cpu().numpy())
            return selection, np.bincount(sample, kept, batch).astype(np.int64)
        pools = budget.pools(tokens)
        if len(selection) != sum(pools.counts):
            raise VTPruneError(
                f"method {self.config.method!r} kept {len(selection)} tokens where its budget was "
                f"{sum(pools.counts)}; a method that finds its own count must say adaptive = True"
            )
        if not self.trusted:  # costs a sync, so once
            borders = torch.tensor(np.cumsum(pools.lens), device=selection.index.device)
            found = torch.bincount(torch.bucketize(selection.index, borders, right=True), minlength=len(pools.lens))
            if tuple(found.tolist()) != pools.counts or bool((torch.diff(selection.index) <= 0).any()):
                raise VTPruneError(
                    f"method {self.config.method!r} kept {found.tolist()} tokens per pool where its budget was "
                    f"{list(pools.counts)}, or named them twice or out of order; see Selection and Budget.pools"
                )
            self.trusted = True
        return selection, _per_sample(pools, tokens.sample_lens(batch))


@functools.lru_cache(maxsize=256)
def _per_sample(pools: Pools, sample_lens: tuple[int, ...]) -> np.ndarray:
    """Kept tokens of each sample; not to be written to."""
    # Pools nest in samples, and both follow the flat rows: where a pool starts tells its sample.
    ends = np.cumsum(sample_lens)
    starts = np.concatenate([[0], np.cumsum(pools.lens)[:-1]]) if pools.lens else np.zeros(0)
    filled = np.asarray(pools.lens) > 0
    sample = np.searchsorted(ends, starts[filled], side="right")
    kept = np.bincount(sample, np.asarray(pools.counts)[filled], len(sample_lens)).astype(np.int64)
    kept.flags.writeable = False
    return kept


@dataclass
class Call:
    """One forward of the inner model, from its first hook to its last.

    Parameters
    ----------
    job
        None where only a pruned cache has to be carried on.
    ids, encodings, given
        The prompt, what the encoder did by modality, other arguments of the forward.
    shape
        Samples and slots of a prompt with pictures; None: there are none.
    fetched
        The prompt on the host.
    labels
        The copy of the labels that the loss will read.
    ahead
        Candidates of assisted generation that came along with the prompt.
    cache, past, state
        The cache, its length before this forward, and the state that it will carry after it.
    rotary
        True positions for the rotary embedding, where the text model is handed contiguous ones.
    reach
        These positions, and a number that the host knows to lie above all of them; see `rotary`.
    tokens, slots
        Visual tokens that are still there, and their packed slots ``sample * width + slot``.
    text_slots
        The same for the tokens of the question.
    trace, packs, counts
        Per stage: what it kept, how its rows were packed, rows per sample after it. `packs` and `counts` start with
        the packing of the prompt, whether or not a stage pruned it.
    direct
        The text model was called by itself.
    layer_inputs, layer_masks
        What layers above a stage get in place of what the text model passes.
    attending, attending_rows
        By layer, who takes part in its attention where some sit it out, and how many rows of each sample.
    entry
        Where visual tokens enter between two layers, what enters and where.
    marks
        What watchers (see `attach.watching`) noted about this call, each under its own key.
    watched
        Whether there are any.
    compiled
        How parts of the model ran, where `PruneConfig.compile` asked for graphs.
    entered
        The text model was called.
    first_rows
        Layers of the cache that keep the first rows they get; see `first_rows`.
    """

    job: Job | None
    ids: Tensor | None = None
    encodings: dict[str, Encoding] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    shape: torch.Size | None = None
    fetched: Fetched | None = None
    labels: Tensor | None = None
    ahead: int = 0
    cache: Any = None
    past: int = 0
    state: pos.CacheState | None = None
    rotary: Tensor | None = None
    reach: tuple[Tensor, int] | None = None
    text_slots: Tensor | None = None
    trace: list[Trace] = field(default_factory=list)
    packs: list[Pack] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    direct: bool = False
    layer_inputs: dict[str, Any] = field(default_factory=dict)
    layer_masks: dict[int, Tensor | None] = field(default_factory=dict)
    attending: dict[int, Attending] = field(default_factory=dict)
    attending_rows: dict[int, list[int]] = field(default_factory=dict)
    entry: Entry | None = None
    marks: dict[Any, Any] = field(default_factory=dict)
    watched: bool = False
    compiled: dict[str, str] = field(default_factory=dict)
    entered: bool = False
    first_rows: list[Any] = field(default_factory=list)
    # Few look at these, or not before the vision tower runs, and they take a handful of launches: they may be given as
    # what makes them.
    _masks: dict[str, Tensor] | Callable[[], dict[str, Tensor]] = field(default_factory=dict)
    _tokens: VisualTokens | Callable[[], VisualTokens] | None = None
    _slots: Tensor | Callable[[], Tensor] | None = None

    @property
    def masks(self) -> dict[str, Tensor]:
        """Placeholders by modality, ``[B, L]`` bool."""
        if callable(self._masks):
            self._masks = self._masks()
        return self._masks

    @masks.setter
    def masks(self, masks: dict[str, Tensor] | Callable[[], dict[str, Tensor]]) -> None:
        self._masks = masks

    @property
    def tokens(self) -> VisualTokens | None:
        if callable(self._tokens):
            self._tokens = self._tokens()
        return self._tokens

    @tokens.setter
    def tokens(self, tokens: VisualTokens | Callable[[], VisualTokens] | None) -> None:
        self._tokens = tokens

    def seen(self) -> VisualTokens:
        """The tokens, where there are some."""
        tokens = self.tokens
        assert tokens is not None
        return tokens

    @property
    def slots(self) -> Tensor | None:
        if callable(self._slots):
            self._slots = self._slots()
        return self._slots

    @slots.setter
    def slots(self, slots: Tensor | Callable[[], Tensor] | None) -> None:
        self._slots = slots

    def left_behind(self, embeds: Tensor | None) -> bool:
        """Whether this is not the forward that calls the text model now, but an earlier one: PyTorch does not call
        hooks, not even those that are always called, when a forward ends with a KeyboardInterrupt."""
        before, self.entered = self.entered, True
        return before or (embeds is not None and self.shape is not None and self.shape != embeds.shape[:2])

    @property
    def alive(self) -> Tensor | None:
        """Flat rows of the unpruned tokens that no stage has dropped; None: all of them."""
        return next((done.kept for done in reversed(self.trace) if not done.stage.reversible), None)

    def set_sequence(self, kw: dict[str, Any], embeds: Tensor, positions: Tensor) -> None:
        """Hand the text model its rows, contiguous positions, the true ones to its rotary, and a mask.

        Attention code takes gaps in positions, where no mask is given, for borders between packed sequences. A mask
        that hides nothing is left out where there is a cache: the model would ask the device what it hides, and wait.
        Without a cache it would look at the positions instead.
        """
        assert self.state is not None
        batch, queries, _ = embeds.shape
        kw["inputs_embeds"] = embeds
        cached = kw.get("past_key_values") is not None or bool(kw.get("use_cache"))
        kw["attention_mask"] = None if cached and self.state.full[0] else self.state.masks[0].long()
        if positions.ndim == 3:
            kw["position_ids"] = pos.with_text_row(positions, self.past)
        else:
            self.rotary = positions
            self.reach = None if self.state.reach is None else (positions, self.state.reach)
            kw["position_ids"] = pos.contiguous(batch, queries, self.past, embeds.device)
        if kw.get("cache_position") is not None:  # older transformers (5.0, 4.57)
            kw["cache_position"] = torch.arange(self.past, self.past + queries, device=embeds.device)
