# SPDX-License-Identifier: Apache-2.0
"""What several test files share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vtprune.registry import Pruner
from vtprune.tokens import CLS_LOGITS, CLS_ROW, VisualTokens

#: One image: its segments as (rows, columns). One sample: its images.
Image = Sequence[tuple[int, int]]


def make_tokens(
    samples: Sequence[Sequence[Image]],
    dim: int = 8,
    features: Tensor | None = None,
    cls_row: Tensor | bool = False,
    kind: str = "image",
    seed: int = 0,
) -> VisualTokens:
    """A batch of pictures with random features. ``make_tokens([[[(4, 6)], [(2, 2), (3, 5)]], [], [[(4, 4)]]])`` has
    three samples with two images (the second of two segments), none and one. ``cls_row=True`` draws a CLS row."""
    images = [(sample, image) for sample, pictures in enumerate(samples) for image in pictures]
    grids = [(index, grid) for index, (_, image) in enumerate(images) for grid in image]
    lens = tuple(h * w for _, (h, w) in grids)
    total = sum(lens)
    generator = torch.Generator().manual_seed(seed)
    coords = [
        torch.tensor([(0, row, col) for row in range(h) for col in range(w)]).reshape(-1, 3) for _, (h, w) in grids
    ]
    if features is None:
        features = torch.randn(total, dim, generator=generator)
    if cls_row is True:
        cls_row = torch.rand(total, generator=generator)
    return VisualTokens(
        features=features,
        seqlens=lens,
        source=torch.arange(total),
        coords=torch.cat([torch.zeros(0, 3), *coords]).float(),
        seg_image=tuple(index for index, _ in grids),
        image_sample=tuple(sample for sample, _ in images),
        seg_kind=(kind,) * len(grids),
        seg_grid=tuple(grid for _, grid in grids),
        seg_box=((0.0, 0.0, 1.0, 1.0),) * len(grids),
        image_grid=((1, 1, 1),) * len(images),
        image_size=(None,) * len(images),
        probes=dict.fromkeys((CLS_ROW, CLS_LOGITS), cls_row) if isinstance(cls_row, Tensor) else {},
    )


def alone(tokens: VisualTokens, samples: Sequence[Sequence[Image]], sample: int) -> tuple[VisualTokens, int]:
    """One sample of ``make_tokens(samples)`` by itself, and the flat row at which it starts in the batch."""
    ends = list(accumulate(sum(h * w for image in pictures for h, w in image) for pictures in samples))
    start = ends[sample - 1] if sample else 0
    rows = slice(start, ends[sample])
    cls_row = tokens.probes.get(CLS_ROW)
    features = tokens.features[rows].clone()
    return make_tokens([samples[sample]], features=features, cls_row=False if cls_row is None else cls_row[rows]), start


class Declared(Pruner):
    """What test-only methods declare, unless they say otherwise."""

    modality = ("image", "video")
    mechanism = ()
    query_aware = False
    training_free = True
    adaptive = False


class NoHostSync(TorchDispatchMode):
    """Within this context, ops that would make the host wait for a GPU raise. Works on the CPU as well."""

    SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counts = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.SYNCS or masks or counts:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


class PeakBytes(TorchDispatchMode):
    """Within this context, `bytes` is the most that tensors made in it held at a time; works on
    fake tensors as well."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return out
