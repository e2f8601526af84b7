# SPDX-License-Identifier: Apache-2.0
"""A trained router that lets visual tokens skip layers: no token is dropped, but most do not take part in every layer.

The token half of FTP (A Fine-grained Token-wise Pruner for Large Language Models via Token Routing, arXiv:2412.11494).
In: in front of each layer a router of a hundred weights reads four numbers of each token and says which tokens the
layer works on; the others pass it by. Left out, or otherwise:

- Visual tokens alone are routed. Text always takes part.
- FTP's four numbers are the token's place, its attention score, the rank of that, and the block's sparsity. Here the
  score is the cosine of the token's row to the last row of the prompt, which asks no layer for its attention.
- Every layer works on the same share of the tokens; FTP searches shares with a genetic algorithm. Its guide loss (a
  static router) and sparsity loss are not needed: the share is met exactly, by a top-k. Its distillation is the
  cross-entropy with the answers of the unrouted model.
- A token that skips a layer still gives that layer its key and value, made from what the token is then.
- It is `skip` with a choice of its own for each layer (the sublayers' output is put to zero), so nothing gets faster;
  `share` says what a layer that gathers its rows would cost.

On `pocket-llava` a router of two minutes' training beats an untrained one, and loses to dropping tokens at equal FLOPs
(``docs/neighbours-learned.md``). It may pay in deep models, whose middle layers change visual rows little, and where no
token may be lost.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..budget import Budget
from ..engine.attach import Engine, watching
from ..engine.call import Call
from ..engine.report import prefill_flops
from ..errors import ConfigError
from ..kernels import reference
from ..models import find_family
from ..pruners import common, weights
from .interventions import _silence, _warn

FEATURES = 4


class Router(nn.Module):
    """Which tokens each layer works on: ``s = b_l . GELU(A_l f + a_l)`` of the four numbers f of a token.

    Parameters
    ----------
    depth
        Layers.
    hidden
        Rows of A.
    """

    def __init__(self, depth: int, hidden: int = 16):
        super().__init__()
        self.first = nn.Parameter(torch.randn(depth, hidden, FEATURES) / FEATURES**0.5)
        self.bias = nn.Parameter(torch.zeros(depth, hidden))
        self.second = nn.Parameter(torch.randn(depth, hidden) / hidden**0.5)

    def forward(self, layer: int, features: Tensor) -> Tensor:
        """Scores ``[...]`` of tokens at a layer from their numbers ``[..., 4]``; larger is likelier to take part."""
        return F.gelu(features @ self.first[layer].T + self.bias[layer]) @ self.second[layer]

    @classmethod
    def load(cls, path: str | Path) -> Router:
        """Read what `vtprune.training.skiprouter` wrote.

        Raises
        ------
        ConfigError
            The file is not there, or holds something else.
        """
        if not Path(path).is_file():
            raise ConfigError(f"there is no router {path}; train one with python -m vtprune.training.skiprouter")
        state = weights.read(Path(path), path, "router")
        return weights.filled(cls(*weights.shape_of(state, "bias", (1, 1))), state, path, "router")


def features(rows: Tensor, last: Tensor, keep: float) -> Tensor:
    """The four numbers of the N tokens of one picture, ``[N, 4]`` fp32.

    Its place among them (-1 to 1), the cosine of its row to `last`, the rank of that among them (1: the largest, to
    -1; ties to the lowest index), and log2 of `keep`, over 4.

    Parameters
    ----------
    rows
        ``[N, D]`` hidden states in front of the layer.
    last
        ``[D]``, that of the last row of the prompt.
    keep
        Share of the tokens that the layer works on.
    """
    count = rows.shape[0]
    cosine = F.cosine_similarity(rows.float(), last.float()[None], dim=1)
    place = torch.linspace(-1, 1, count, device=rows.device)
    order = cosine.detach().sort(descending=True, stable=True).indices
    rank = torch.empty_like(place).index_copy(0, order, place.flip(0))
    return torch.stack([place, cosine, rank, torch.full_like(place, keep).log2() / 4], 1)


@contextmanager
def skiprouter(model: nn.Module, router: Router, keep: float) -> Iterator[None]:
    """Within this block, each layer works on the `keep` visual tokens of each picture that the router likes best.

    Parameters
    ----------
    model
        A stock transformers model of a supported family, not pruned. Prompts that come as embeddings, without ids, are
        padded at the left, if at all.
    router
        Trained for this model.
    keep
        A float in (0, 1], rounded as in `Budget`.

    Raises
    ------
    ConfigError
        `keep` is no share, the router is of another depth, or pruning is applied to the model.

    Warns
    -----
    VTPruneWarning
        At the end of the block, if it saw no prompt with pictures.
    """
    family = find_family(model)
    depth = len(family.lm.layers)
    if router.bias.shape[0] != depth:
        raise ConfigError(f"the router is for {router.bias.shape[0]} layers, the model has {depth}; train one for it")
    common.share("keep", keep)
    budget = Budget(float(keep), allocation="pooled")
    router = router.to(family.vocabulary.device)
    key = object()
    fired = False

    def note(call: Call) -> None:
        nonlocal fired
        fired = True
        if call.job is not None:
            raise ConfigError("tokens cannot be routed while they are pruned; call vtprune.remove(model) first")
        assert call.tokens is not None
        pools = budget.pools(call.tokens)
        call.marks[key] = (pools, call.tokens.image_sample, _last_rows(call))

    with watching(family, note) as engine, ExitStack() as stack:
        for i, layer in enumerate(family.lm.layers):
            choose = functools.partial(_choose, engine, key, router, i, float(keep))
            stack.callback(layer.register_forward_pre_hook(choose, with_kwargs=True).remove)
            for part in (layer.self_attn, layer.mlp):
                stack.callback(part.register_forward_hook(functools.partial(_silence, engine, (key, i))).remove)
        yield
        if not fired:
            _warn("skiprouter", engine)


def _choose(
    engine: Engine, key: object, router: Router, index: int, keep: float, _module: nn.Module, args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:  # fmt: skip
    """Mark the tokens that skip a layer."""
    call = engine.local.call
    if call is None or key not in call.marks or call.slots is None:
        return
    pools, samples, ends = call.marks[key]
    hidden = args[0] if args else kwargs["hidden_states"]
    slots = call.slots.to(hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        rows = hidden.flatten(0, 1)[slots]
        scores = [
            router(index, features(part, hidden[sample, -1 if call.packs else ends[sample]], keep))
            for part, sample in zip(rows.split(list(pools.lens)), samples, strict=True)
        ]
        stays = reference.topk(torch.cat(scores), pools.lens, pools.counts)
        call.marks[key, index] = torch.ones_like(slots, dtype=torch.bool).index_fill(0, stays, False)


def _last_rows(call: Call) -> list[int]:
    """Where the prompt of each sample ends, counted from the right of a batch that is not packed."""
    assert call.tokens is not None
    if call.fetched is None or call.fetched.valid is None:
        return [-1] * call.tokens.num_samples
    return [-1 - int(gap) for gap in call.fetched.valid[:, ::-1].argmax(1)]


def share(config: Any, rows: int, visual: int, keep: float) -> float:
    """Prefill FLOPs of a routed prompt over those of the dense one.

    A token that skips a layer costs its key and value, and no query, output, or FFN.

    Parameters
    ----------
    config
        Of the language model.
    rows, visual
        Rows of the prompt, and how many of them are visual tokens.
    keep
        As in `skiprouter`.
    """
    gone = visual - max(1, int(visual * keep + 1e-6))
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    spared = 2 * gone * (2 * hidden * head * heads + 3 * hidden * config.intermediate_size)
    spared += 4 * gone * rows * heads * head
    return 1 - spared / prefill_flops(rows, config)
