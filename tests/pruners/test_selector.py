# SPDX-License-Identifier: Apache-2.0
"""The trained selector: its network by hand and against a plain reading of its docstring, its cost, its files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import NoHostSync, make_tokens
from safetensors.torch import save_file
from torch import Tensor

import vtprune
from vtprune.engine.report import prefill_flops
from vtprune.errors import ConfigError
from vtprune.pruners import selector as selectors
from vtprune.pruners.selector import PLACE, Network, load, order, places
from vtprune.registry import build


def saved(folder: Path, width: int = 8, **more: Tensor) -> str:
    torch.manual_seed(0)
    path = folder / f"selector-{width}-{len(more)}.safetensors"
    save_file({**Network(width).state_dict(), **more}, path)
    return str(path)


def asked(tokens: vtprune.VisualTokens, lens: tuple[int, ...], seed: int = 1) -> vtprune.VisualTokens:
    """The tokens with a question for each sample."""
    text = torch.randn(sum(lens), tokens.features.shape[1], generator=torch.Generator().manual_seed(seed))
    return replace(tokens, text=text, text_lens=lens)


def test_a_selection_worked_out_by_hand() -> None:
    """No block, A = the first two of four axes, P = 0, w = (1, 0, 0, 0): score = LayerNorm(A n(x))_1.

    x = (1, 0): n = (sqrt 2, 0), row (sqrt 2, 0, 0, 0), mean sqrt 2 / 4, deviation sqrt 6 / 4: score 3 / sqrt 3.
    x = (0, 1): the same row turned: score -1 / sqrt 3.   x = (2, 2): n = (1, 1), row (1, 1, 0, 0), mean 1 / 2,
    deviation 1 / 2: score 1.   x = (-5, 0): row (-sqrt 2, 0, 0, 0): score -3 / sqrt 3.
    """
    network = Network(2, 4, 8, 0).requires_grad_(False)
    for p in network.parameters():
        p.zero_()
    network.norm.weight.fill_(1.0)
    network.visual.weight[:2] = torch.eye(2)
    network.head.weight[0, 0] = 1.0
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [-5.0, 0.0]])
    tokens = make_tokens([[[(2, 2)]]], features=rows)
    pruner = build("selector", {"mmr_lambda": 1.0})
    pruner._network = network  # type: ignore[attr-defined]
    root = math.sqrt(3)
    torch.testing.assert_close(pruner.score(tokens), torch.tensor([root, -1 / root, 1.0, -root]), atol=1e-4, rtol=0)
    selection = pruner.select(tokens, vtprune.Budget(0.5))
    assert selection.index.tolist() == [0, 2] and selection.order is not None and selection.order.tolist() == [0, 2]


def plainly(network: Network, visual: Tensor, place: Tensor, words: Tensor) -> Tensor:
    """The docstrings of `Network` and `Block`, read literally, one row and one head at a time."""

    def n(v: Tensor) -> Tensor:
        return v / (v.square().mean() + 1e-6).sqrt()

    code = order(len(words), network.start)
    rows = [network.start]
    rows += [network.word.weight @ n(e) + network.word.bias + code[i] for i, e in enumerate(words)]
    rows += [
        network.visual.weight @ n(x) + network.visual.bias + network.place.weight @ p
        for x, p in zip(visual, place, strict=True)
    ]
    for block in network.blocks:
        parts = [block.qkv(block.first(row)).chunk(3) for row in rows]
        out = []
        for i, row in enumerate(rows):
            heads = []
            for h in range(0, len(parts[0][0]), 8):
                q, ks = parts[i][0][h : h + 8], torch.stack([k[h : h + 8] for _, k, _ in parts])
                weight = (ks @ q / math.sqrt(8)).softmax(0)
                heads.append(weight @ torch.stack([v[h : h + 8] for _, _, v in parts]))
            row = row + block.out(torch.cat(heads))
            out.append(row + block.down(torch.nn.functional.gelu(block.up(block.second(row)))))
        rows = out
    return torch.stack([network.head(network.norm(row))[0] for row in rows[-len(visual) :]])


@pytest.mark.parametrize("words", [0, 3])
def test_the_network_is_what_its_docstring_says(words: int) -> None:
    torch.manual_seed(0)
    network = Network(6, 16, 16, 2).double().requires_grad_(False)
    visual, place = torch.randn(5, 6, dtype=torch.float64) * 9, torch.randn(5, PLACE, dtype=torch.float64)
    said = torch.randn(words, 6, dtype=torch.float64)
    want = plainly(network, visual, place, said)
    torch.testing.assert_close(network(visual[None], place[None], said[None])[0], want)
    # Padding of both kinds changes nothing.
    wide = [torch.cat([x, torch.randn(2, x.shape[1], dtype=torch.float64)])[None] for x in (visual, place, said)]
    sound, spoken = torch.arange(7)[None] < 5, torch.arange(words + 2)[None] < words
    torch.testing.assert_close(network(*wide, sound, spoken)[0, :5], want)


def test_places_by_hand() -> None:
    """The second token of the bottom row of a 2 x 4 grid: its middle is 3/4 down and 3/8 across; it is 1/2 high."""
    found = places(make_tokens([[[(2, 4)]]]))[5]
    scale = [math.pi * 2**k for k in range(5)]
    angles = [0.0] * 5 + [0.75 * s for s in scale] + [0.375 * s for s in scale]
    want = [math.sin(a) for a in angles] + [math.cos(a) for a in angles] + [math.log2(0.5) / 8]
    torch.testing.assert_close(found, torch.tensor(want), atol=1e-5, rtol=0)


def test_a_crop_knows_its_place_in_the_picture() -> None:
    """The lower right quarter of a picture, as a crop of its own, has the places of that quarter of the whole."""
    whole, crop = make_tokens([[[(4, 4)]]]), make_tokens([[[(2, 2)]]])
    crop = replace(crop, seg_box=((0.5, 0.5, 1.0, 1.0),))
    torch.testing.assert_close(places(crop), places(whole)[[10, 11, 14, 15]])


def test_scores_hang_on_the_question_and_on_nothing_else_of_the_batch(tmp_path: Path) -> None:
    pruner = build("selector", {"weights": saved(tmp_path)})
    shape = [[[(3, 4)]], [[(2, 2), (2, 3)], [(2, 2)]]]
    tokens = asked(make_tokens(shape), (4, 2))
    scores = pruner.score(tokens)
    first = asked(make_tokens(shape[:1], features=tokens.features[:12].clone()), (4,))
    first = replace(first, text=tokens.text[:4])  # type: ignore[index]
    assert torch.equal(pruner.score(first), scores[:12])
    other = pruner.score(replace(tokens, text=tokens.text.flip(0)))  # type: ignore[union-attr]
    assert not torch.allclose(other[:12], scores[:12], atol=1e-4)
    silent = replace(tokens, text=None, text_lens=None)
    assert bool(pruner.score(silent).isfinite().all())


def test_a_broken_row_comes_last_and_does_not_spoil_the_others(tmp_path: Path) -> None:
    pruner = build("selector", {"weights": saved(tmp_path)})
    tokens = asked(make_tokens([[[(2, 5)]]]), (3,))
    broken = tokens.features.clone()
    broken[4] = torch.nan
    scores = pruner.score(replace(tokens, features=broken))
    assert scores[4].isnan() and int(scores.isnan().sum()) == 1
    filled = broken.nan_to_num(7.0)
    torch.testing.assert_close(scores.nan_to_num(0.0), pruner.score(replace(tokens, features=broken)).nan_to_num(0.0))
    assert not torch.allclose(pruner.score(replace(tokens, features=filled))[:4], scores[:4], atol=1e-6)
    assert 4 not in pruner.select(replace(tokens, features=broken), vtprune.Budget(9)).index.tolist()


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    pruner = build("selector", {"weights": saved(tmp_path)})
    tokens = asked(make_tokens([[[(3, 4)]], [[(2, 2), (2, 3)]]]), (4, 2))
    with NoHostSync():
        pruner.score(tokens)


LLAVA_7B = SimpleNamespace(hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008)


def test_what_it_costs_is_what_the_guide_says() -> None:
    """The network and the cosines of its better half are below 3 % of the prefill."""
    model, _ = vtprune.load("pocket-llava")
    text = model.config.text_config
    whole = text.num_hidden_layers * prefill_flops(576 + 12, text)
    network, pairs = Network(text.hidden_size).flops(576, 10), 2 * 288**2 * text.hidden_size
    assert network + pairs < 0.03 * whole
    cells = {
        "network": network,
        "cosines of all pairs of the better half, `N^2 D / 2`": pairs,
        "together": network + pairs,
    }
    page = (Path(__file__).parents[2] / "docs/neighbours-learned.md").read_text(encoding="utf-8")
    for label, cost in cells.items():
        assert f"| {label} | {100 * cost / whole:.2f} % |" in page
    large = 32 * prefill_flops(576 + 60, LLAVA_7B)
    assert Network(4096, 128, 64).flops(576, 40) + 2 * 288**2 * 4096 < 0.0003 * large


def test_what_is_counted_is_what_is_computed(tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    tokens = asked(make_tokens([[[(6, 8)]]]), (3,))
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    pruner = build("selector", {"weights": saved(tmp_path)})
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        pruner.select(tokens, vtprune.Budget(4))
    assert counter.get_total_flops() == load(saved(tmp_path)).flops(48, 3) + 2 * 24**2 * 8


def test_picks_are_made_among_the_better_half_and_behind_it_by_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five and four tokens three and two are the better half. By hand, with scores on [0, 1] and half of each
    weight: the best first, then the one that is orthogonal to it, then its double."""
    features = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    scores = torch.tensor([1.0, 0.5, 0.9, 0.0, 0.1, 0.0, 0.3, 0.2, 1.0])
    pruner = build("selector", {"weights": saved(tmp_path)})
    monkeypatch.setattr(type(pruner), "score", lambda *_: scores)
    tokens = make_tokens([[[(1, 5)], [(1, 4)]]], features=features)
    for count, wanted in ((1, [0, 8]), (2, [0, 1, 8, 6]), (3, [0, 1, 2, 8, 6, 7]), (4, [0, 1, 2, 4, 8, 6, 7, 5])):
        picks = pruner.select(tokens, vtprune.Budget(count))
        assert picks.order.tolist() == wanted and picks.index.tolist() == sorted(wanted)


def test_the_cost_is_counted_as_pytorch_counts_it() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = Network(24, 32, 16, 2)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        network(torch.randn(1, 20, 24), torch.randn(1, 20, PLACE), torch.randn(1, 5, 24))
    assert counter.get_total_flops() == network.flops(20, 5)


def test_files_that_are_no_selector_are_refused(tmp_path: Path) -> None:
    assert load(saved(tmp_path)).width == 8
    with pytest.raises(ConfigError, match="there is no selector nowhere"):
        load("nowhere")
    with pytest.raises(ConfigError, match="holds no selector: more"):
        load(saved(tmp_path, more=torch.zeros(1)))
    state = load(saved(tmp_path)).state_dict()
    for name in ("visual.weight", "blocks.0.out.weight"):
        for odd, message in ((state[name].flatten(), "holds no selector: "), (state[name] * math.nan, "is spoilt")):
            save_file({**state, name: odd}, tmp_path / "odd.safetensors")
            with pytest.raises(ConfigError, match=message):
                load(tmp_path / "odd.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        load(tmp_path / "torn.safetensors")
    with pytest.raises(ConfigError, match="weights=3"):
        build("selector", {"weights": 3})
    with pytest.raises(ConfigError, match=r"no selector for llava-7b.*vtprune\.training\.selector"):
        selectors.find("somebody/llava-7b")


def test_a_selector_of_another_width_is_refused(tmp_path: Path) -> None:
    pruner = build("selector", {"weights": saved(tmp_path, 12)})
    with pytest.raises(ConfigError, match="tokens of width 12, this model's have 8"):
        pruner.check_model(8, None)
    with pytest.raises(ConfigError, match="width 12"):
        pruner.score(make_tokens([[[(2, 2)]]]))
