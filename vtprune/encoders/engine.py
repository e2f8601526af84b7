# SPDX-License-Identifier: Apache-2.0
"""Hooks that drop or merge patch tokens between two blocks of a vision transformer, and put all rows back at its end.

One pass: the patch embedding tells the grid; the block behind a stage and all after it get the kept rows alone; the
last norm puts out all rows again, so that shapes are those of the model without vtprune.

What stands in the slot of a dropped patch is the mean of the kept rows of its picture. A mean or a maximum over all
patches is then one over the kept ones, whoever pools, and wherever. Pooling by attention has no such row, so it is
handed the kept rows alone.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..budget import SteppedBudget
from ..config import PruneConfig
from ..engine.attach import ATTRIBUTE, job_of
from ..engine.call import Job
from ..engine.report import Report, image_reports
from ..errors import ConfigError, InputError, UnsupportedModelError, VTPruneError, VTPruneWarning
from ..models.base import raster
from ..tokens import PROJECTOR, Selection, VisualTokens
from .vit import Encoder, block_flops, left, pictures, turns


@dataclass
class EncoderJob:
    """A configuration made ready for one encoder: what happens after which block."""

    config: PruneConfig
    steps: dict[int, Job]


@dataclass(frozen=True)
class EncoderReport(Report):
    """What the last pass of an encoder did; FLOPs are those of its blocks."""

    part: ClassVar[str] = "blocks of the encoder"


@dataclass
class _Pass:
    """One pass through the encoder, from its patch embedding on."""

    job: EncoderJob
    grid: tuple[int, int]
    whole: bool  # every block puts out all rows, for a caller who asked for them
    index: Tensor | None = None  # [B, K] patches that are left, ascending
    order: Tensor | None = None  # [B * K] flat patches in the order of choice
    seen: dict[int, Tensor] = field(default_factory=dict)  # what the attention of a block read, until its stage is over
    counts: dict[int, int] = field(default_factory=dict)  # patches that are left after a stage
    info: dict[str, str] = field(default_factory=dict)

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


class _Local(threading.local):
    now: _Pass | None = None
    whole: bool = False
    report: Callable[[], Report] | None = None
    #: Rows that were put back, as long as they live, and which of them were kept: for pooling by attention.
    restored: tuple[tuple[StorageWeakRef, Tensor, int], ...] = ()


class EncoderEngine:
    """One per encoder, found as `Engine` is. Holds no tensor of a past pass but what the report needs."""

    def __init__(self, encoder: Encoder) -> None:
        self.family = encoder
        self.job: EncoderJob | None = None
        self.users = 0
        self.local = _Local()
        self.handles: list[Any] = []
        self.watched: set[int] = set()
        self.wrapper: Any = None
        self.before: Any = None
        self.reset_counters()

    last_report: Callable[[], Report] | None

    def reset_counters(self) -> None:
        """Forget what has fired; `silence` says why nothing has."""
        self.local.report = self.last_report = None
        self.fired = False
        self.silence = "no forward was run"

    def __deepcopy__(self, memo: Any) -> EncoderEngine:
        raise VTPruneError("a model with vtprune applied cannot be copied; call vtprune.remove(model) first")

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise VTPruneError("a model with vtprune applied cannot be pickled; call vtprune.remove(model) first")

    # -- on and off ---------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        encoder, inner = self.family, self.family.inner
        self.handles.append(encoder.start.register_forward_pre_hook(self._begin))
        for i, block in enumerate(encoder.blocks):
            hook = functools.partial(self._enter_block, i)
            self.handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
            self.handles.append(block.register_forward_hook(self._leave_block))
        self.handles += [module.register_forward_hook(self._leave_last) for module in encoder.exits]
        self.handles += [module.register_forward_pre_hook(self._enter_pooler) for module in encoder.poolers]
        self.wrapper, self.before = self._wrap(inner.forward_intermediates), inner.__dict__.get("forward_intermediates")
        inner.forward_intermediates = self.wrapper
        setattr(inner, ATTRIBUTE, self)

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.watched = [], set()
        own = self.family.inner.__dict__
        if self.wrapper is not None and own.get("forward_intermediates") is self.wrapper:
            del own["forward_intermediates"]
            own.update({} if self.before is None else {"forward_intermediates": self.before})
        own.pop(ATTRIBUTE, None)

    def meet(self, family: Any) -> None:
        """There is nothing outside of the encoder to see to."""

    def drop_graphs(self) -> None:
        """There are none."""

    def prepare(self, config: PruneConfig) -> EncoderJob:
        """Check that `config` can run on this encoder, and hook what only it needs.

        Raises
        ------
        ConfigError, UnsupportedModelError
            The method looks at a question, acts inside a language model or finds its own count; it needs a probe that
            the encoder does not have; or there is no such block.
        """
        pruner, name = config.pruner(), config.label
        for option, value, only in (("positions", config.positions, "original"), ("compile", config.compile, None)):
            if value != only:
                raise ConfigError(f"{option}={value!r} is for language models; an encoder alone has only {only!r}")
        if config.tower_keep < 1.0:
            raise ConfigError(
                f"tower_keep={config.tower_keep} is for a vision tower with a language model behind it; in an encoder "
                "alone, keep and layer say the same"
            )
        if any(stage.layer is not None for stage in pruner.stages()):
            raise ConfigError(
                f"method {name!r} prunes inside a language model, and an encoder alone has none; choose a method that "
                "acts at the projector"
            )
        if pruner.query_aware:
            raise ConfigError(f"method {name!r} looks at the question, and an encoder alone has none; choose another")
        if pruner.adaptive:
            raise ConfigError(
                f"method {name!r} finds a count of its own for each picture, but in an encoder all pictures of a batch "
                "have as many rows; choose another method"
            )
        if "image" not in pruner.modality:
            raise ConfigError(
                f"method {name!r} prunes {' and '.join(pruner.modality)} tokens; an encoder sees pictures"
            )
        layers = self._layers(config)
        watchable = self.family.has_cls and all(self._watch(layer) for layer in layers)
        for probe in pruner.needs:
            if probe.name != "cls_row" or not watchable:
                raise UnsupportedModelError(
                    f"method {name!r} needs {probe.name!r}, which this {self.family.label} encoder alone cannot give; "
                    "choose another method" + (" or importance='auto'" if probe.name == "cls_row" else "")
                )
        pruner.check_model(self.family.width, None)
        pruner.check_checkpoint("", torch.empty(0, self.family.width))
        budget = config.budget()
        wanted = frozenset(p for p in pruner.needs | pruner.wants | budget.wants if p.name == "cls_row" and watchable)
        steps = {}
        for i, layer in enumerate(layers):
            last = i + 1 == len(layers)
            own = budget if last else SteppedBudget.towards(budget, (i + 1) / len(layers))
            steps[layer] = Job(config, pruner, own, (PROJECTOR,), wanted, frozenset())
        return EncoderJob(config, steps)

    def _layers(self, config: PruneConfig) -> tuple[int, ...]:
        """The blocks after which patches go, ascending."""
        depth = len(self.family.blocks)
        given = config.layer
        layers = (max(0, depth // 3 - 1),) if given is None else (given,) if isinstance(given, int) else tuple(given)
        for layer in layers:
            if layer > depth - 2:
                raise ConfigError(
                    f"layer={given!r} lies behind the last place between two blocks; this encoder has blocks 0 to "
                    f"{depth - 1}, choose a layer in 0..{depth - 2}"
                )
        return layers

    def _watch(self, layer: int) -> bool:
        """Make sure that the CLS row of this block can be made; False where it cannot."""
        if layer not in self.watched:
            handle = self.family.watch(self.family.blocks[layer], functools.partial(self._see, layer))
            if handle is None:
                return False
            self.handles.append(handle)
            self.watched.add(layer)
        return True

    # -- one pass -----------------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        job = job_of(self)
        self.local.now = None
        if job is None:
            return
        if self.family.checkpoints and torch.is_grad_enabled():  # in eval mode too
            raise UnsupportedModelError(
                "dropping rows inside an encoder does not work with gradient checkpointing, which runs blocks again; "
                "switch it off"
            )
        now = self.local.now = _Pass(job, self.family.grid(args[0]), self.local.whole)
        self.silence = "no forward got as far as the block after which patches are dropped"
        self.local.report = self.last_report = functools.partial(self._report, now, len(args[0]))

    def _see(self, layer: int, rows: Tensor) -> None:
        now = self.local.now
        if now is not None and layer in now.job.steps and now.job.steps[layer].probes:
            now.seen[layer] = rows

    def _enter_block(self, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self.local.now
        if now is None or (now.index is None and block - 1 not in now.job.steps):
            return None
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise InputError("an attention mask is for all patches, and cannot be used on an encoder that drops some")
        rows: Tensor = args[0]
        if now.index is not None and rows.shape[1] == self.family.prefix + now.patches:
            rows = left(rows, now.index, now.patches)
        if block - 1 in now.job.steps:
            rows = self._drop(now, block - 1, rows)
        if now.index is None:
            return None
        if isinstance(kwargs.get("rope"), Tensor):
            kwargs = {**kwargs, "rope": turns(kwargs["rope"], now.index)}
        return (rows, *args[1:]), kwargs

    def _drop(self, now: _Pass, layer: int, rows: Tensor) -> Tensor:
        """What is left of ``[B, P + n, d]`` after a stage, ``[B, P + k, d]``."""
        batch, (prefix, job) = len(rows), (self.family.prefix, now.job.steps[layer])
        n = rows.shape[1] - prefix
        if n != (now.patches if now.index is None else now.index.shape[1]):
            raise InputError(
                f"block {layer + 1} was given {n} patches of a grid of {now.grid[0]} x {now.grid[1]}; patch dropout "
                "does not go together with pruning, switch it off (model.eval())"
            )
        tokens = self._tokens(now, layer, rows)
        now.seen.pop(layer, None)
        if job.keeps_everything(tokens):
            self.fired = True  # it did what it was told to
            if isinstance(job.budget.keep, int) and job.budget.keep >= now.patches:
                warnings.warn(
                    f"keep={job.budget.keep} is not below the {n} patches of a picture: all are kept; give a smaller "
                    "number, or a fraction",
                    VTPruneWarning,
                    stacklevel=2,
                )
            return rows
        selection, _ = job.select(tokens, PROJECTOR, batch)
        self.fired = True
        kept = selection.index.view(batch, -1)  # every picture keeps as many: one grid, one budget
        first = torch.arange(batch, device=rows.device)[:, None]
        if selection.features is None:
            index = torch.cat(
                [torch.arange(prefix, device=rows.device).expand(batch, -1), kept - first * n + prefix], 1
            )
            index = index + first * (prefix + n)
            out = rows.reshape(-1, rows.shape[-1])[index.flatten()].view(batch, -1, rows.shape[-1])
        else:
            merged = selection.features.to(rows.dtype).view(batch, -1, rows.shape[-1])
            out = torch.cat([rows[:, :prefix], merged], 1)
        self._note(now, layer, selection, kept - first * n)
        return out

    def _tokens(self, now: _Pass, layer: int, rows: Tensor) -> VisualTokens:
        batch, prefix, (height, width) = len(rows), self.family.prefix, now.grid
        features = rows[:, prefix:].detach().reshape(-1, rows.shape[-1])
        flat = torch.arange(batch * now.patches, device=rows.device).view(batch, -1)
        coords = torch.from_numpy(raster(1, height, width)).to(rows.device, non_blocking=True).expand(batch, -1, -1)
        if now.index is not None:
            flat = flat.gather(1, now.index)
            coords = coords.gather(1, now.index[..., None].expand(-1, -1, 3))
        block, job = self.family.blocks[layer], now.job.steps[layer]
        seen = now.seen.get(layer)
        made: dict[bool, Tensor] = {}
        if seen is not None:
            made = {soft: self.family.cls_row(block, seen, soft) for soft in {p.softmax for p in job.probes}}
        probes = {probe: made[probe.softmax] for probe in job.probes if made}
        return pictures(now.grid, batch, features, coords.reshape(-1, 3), flat.flatten(), probes)

    def _note(self, now: _Pass, layer: int, selection: Selection, kept: Tensor) -> None:
        """Remember which patches ``kept [B, K]`` of those that a stage saw are left."""
        before, now.order = now.index, None
        if selection.order is not None:
            n = now.patches if before is None else before.shape[1]
            sample, row = selection.order // n, selection.order % n
            now.order = sample * now.patches + (row if before is None else before[sample, row])
        now.index = kept if before is None else before.gather(1, kept)
        now.counts[layer] = now.index.shape[1]
        now.info.update(selection.info)

    # -- all rows again -----------------------------------------------------------------------------------------------

    def _leave_block(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        now = self.local.now
        return self._restore(now, out) if now is not None and now.whole else None

    def _leave_last(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        now = self.local.now
        return self._restore(now, out) if now is not None and (now.whole or now.job.config.restore) else None

    def _restore(self, now: _Pass, rows: Any) -> Tensor | None:
        """Rows ``[B, P + N, d]`` from those that are left; the mean of a picture's kept rows where one was dropped."""
        prefix, index = self.family.prefix, now.index
        if index is None or not isinstance(rows, Tensor) or rows.ndim != 3 or len(rows) != len(index):
            return None
        if rows.shape[1] == prefix + now.patches:
            rows = left(rows, index, now.patches)
        elif rows.shape[1] != prefix + index.shape[1]:
            return None
        kept = rows[:, prefix:]
        mean = kept.float().mean(1, keepdim=True).to(kept.dtype)
        out = torch.cat([rows[:, :prefix], mean.expand(-1, now.patches, -1)], 1)
        out = out.scatter(1, (index + prefix)[..., None].expand_as(kept), kept)
        alive = tuple(known for known in self.local.restored if not known[0].expired())
        self.local.restored = (*alive, (StorageWeakRef(out.untyped_storage()), index, now.patches))
        return out

    def _enter_pooler(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        rows = args[0]
        for storage, index, patches in self.local.restored:
            if not storage.expired() and storage.cdata == rows.untyped_storage()._cdata:
                size = (self.family.prefix + patches) * rows.shape[-1]  # of a picture; some may have been sliced off
                index = index[rows.storage_offset() // size :: max(1, rows.stride(0) // size)][: len(rows)]
                return (left(rows, index, patches), *args[1:])
        return None

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``forward_intermediates``, which shows what every block puts out, as pictures."""

        @functools.wraps(original)
        def forward_intermediates(*args: Any, **kwargs: Any) -> Any:
            self.local.whole = True
            try:
                return original(*args, **kwargs)
            finally:
                self.local.whole = False

        return forward_intermediates

    # -- what happened ------------------------------------------------------------------------------------------------

    def _report(self, now: _Pass, batch: int) -> EncoderReport:
        config, blocks, patches = now.job.config, self.family.blocks, now.patches
        kept, order = np.ones(batch * patches, bool), None
        if now.index is not None:
            kept[:] = False
            flat = now.index + patches * torch.arange(batch, device=now.index.device)[:, None]
            kept[flat.flatten().cpu().numpy()] = True
        if now.order is not None:
            order = np.full(len(kept), -1)
            order[now.order.cpu().numpy()] = np.arange(len(now.order))
        coords = torch.from_numpy(raster(1, *now.grid)).repeat(batch, 1)
        images = image_reports(pictures(now.grid, batch, coords, coords, coords, {}), kept, order)
        rows = [patches] * len(blocks)
        for layer, count in now.counts.items():
            rows[layer + 1 :] = [count] * (len(blocks) - layer - 1)
        prefix = self.family.prefix
        return EncoderReport(
            method=config.label,
            keep=config.keep,
            samples=batch,
            images=images,
            tokens_in=len(kept),
            tokens_out=int(kept.sum()),
            ratio=float(kept.mean()),
            stages=tuple(f"block {layer}" for layer in now.counts),
            flops_before=batch * sum(block_flops(block, prefix + patches, self.family.width) for block in blocks),
            flops_after=batch
            * sum(block_flops(block, prefix + n, self.family.width) for block, n in zip(blocks, rows, strict=True)),
            info=now.info,
            notes=(),
            compiled={},
        )
