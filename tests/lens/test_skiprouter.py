# SPDX-License-Identifier: Apache-2.0
"""Visual tokens that a router lets skip layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

import vtprune
from vtprune.errors import ConfigError, VTPruneWarning
from vtprune.lens.interventions import skip
from vtprune.lens.skiprouter import Router, features, share, skiprouter
from vtprune.models import find_family
from vtprune.tokens import VisualTokens
from vtprune.training import lessons as school
from vtprune.training import skiprouter as training

EVERY = [layer + part for layer in range(tiny.LAYERS) for part in (0, 0.5)]


def test_the_four_numbers_by_hand() -> None:
    """Rows (1, 0), (0, 2), (1, 1) before the last row (3, 0): cosines 1, 0, 1 / sqrt 2; ranks 1, -1, 0; keep 1/4."""
    found = features(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([3.0, 0.0]), 0.25)
    want = torch.tensor([[-1, 1, 1, -0.5], [0, 0, -1, -0.5], [1, 0.5**0.5, 0, -0.5]])
    torch.testing.assert_close(found, want)


def test_a_score_by_hand() -> None:
    """A = (1, 0, 0, 2), a = 1, b = 3, f = (1, 5, 5, -1/2): 3 GELU(1 - 1 + 1) = 3 * 0.841345."""
    router = Router(1, 1).requires_grad_(False)
    router.first.copy_(torch.tensor([[[1.0, 0.0, 0.0, 2.0]]]))
    router.bias.fill_(1.0)
    router.second.fill_(3.0)
    torch.testing.assert_close(
        router(0, torch.tensor([1.0, 5.0, 5.0, -0.5])), torch.tensor(3 * 0.8413447), atol=1e-5, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_an_indifferent_router_is_the_lens_skip_of_all_but_the_first_tokens(family: str) -> None:
    model = tiny.build(family)
    router = Router(tiny.LAYERS).requires_grad_(False)
    router.second.zero_()  # ties go to the lowest index
    batch = tiny.collate([tiny.prompt(model, 2), tiny.prompt(model, 1)])

    def late(tokens: VisualTokens) -> Tensor:
        counts = [max(1, n // 4) for n in tokens.image_lens]
        return torch.cat([torch.arange(n) >= k for n, k in zip(tokens.image_lens, counts, strict=True)])

    with skip(model, EVERY, late):
        want = model(**batch).logits
    with skiprouter(model, router, 0.25):
        found = model(**batch).logits
        said = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, want) and not torch.allclose(found, model(**batch).logits, atol=1e-3)
    assert said.shape[1] == batch["input_ids"].shape[1] + 3
    whole = model(**batch).logits
    with skiprouter(model, router, 1.0):
        assert torch.equal(model(**batch).logits, whole)


@torch.no_grad()
def test_padding_at_the_right_is_not_taken_for_the_last_row() -> None:
    model = tiny.build("llava")
    torch.manual_seed(1)
    samples = [tiny.prompt(model, 1, seed=1), tiny.prompt(model, 2, seed=2)]
    batch = tiny.collate(samples, "right")
    length = samples[0]["input_ids"].shape[1]
    with skiprouter(model, Router(tiny.LAYERS), 0.3):
        want = model(**samples[0]).logits[0]
        found = model(**batch).logits[0, :length]
    torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-4)


def test_what_is_trained_is_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature 0 the gates are the choice of `skiprouter`, and softly the loss has a gradient in each layer."""
    model = tiny.build("llava").requires_grad_(False)
    monkeypatch.setattr(torch, "bfloat16", torch.float32)
    torch.manual_seed(3)
    router = Router(tiny.LAYERS)
    sample = tiny.prompt(model, 1)
    with school._prefill(find_family(model)) as seen, torch.no_grad():
        model(**sample)
    lessons = list(school._lessons(find_family(model), sample, seen, [[7]], "cpu"))
    batch = school.collate(lessons, model.get_input_embeddings().weight)
    with torch.no_grad(), training.gated(model, router, batch, 0.3, 0.0):
        found, _ = school.answer_logits(model, batch)
    with torch.no_grad(), skiprouter(model, router, 0.3):
        want = model(**sample).logits[0, -1:]
    torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-4)
    with training.gated(model, router, batch, 0.3, 0.5):
        school.cross_entropy(*school.answer_logits(model, batch)).backward()
    assert router.first.grad is not None
    assert bool((router.first.grad.flatten(1).norm(dim=1)[:-1] > 0).all()), "a layer is not trained"
    assert not router.first.grad[-1].any(), "nobody reads what the last layer makes of a visual token"
    before = float(school.cross_entropy(*school.answer_logits(model, batch)))
    trained = training.train(model, lessons, 3, 1, 1e-2, 0, 60.0, say=lambda _: None)
    assert before > 0 and not torch.equal(trained.first, Router(tiny.LAYERS).first)


def test_share_by_hand() -> None:
    """d = 2, one head of 2, m = 1, 10 rows, 8 visual of which 2 stay: 10 rows cost 440 + 800; each of the 6 that skip
    spares 2 [2 * 4 + 6] = 28 of its own and 4 * 10 * 2 = 80 of attention: 648 of 1240."""
    config = SimpleNamespace(hidden_size=2, num_attention_heads=1, intermediate_size=1)
    assert share(config, 10, 8, 0.25) == pytest.approx(1 - 648 / 1240)
    assert share(config, 10, 8, 1.0) == 1.0


def test_mistakes_are_named(tmp_path: Path) -> None:
    model = tiny.build("llava")
    with (
        pytest.raises(ConfigError, match=f"for 2 layers, the model has {tiny.LAYERS}"),
        skiprouter(model, Router(2), 0.5),
    ):
        pass
    router = Router(tiny.LAYERS)
    with vtprune.apply(model, "norm", keep=0.5), skiprouter(model, router, 0.5):
        with pytest.raises(ConfigError, match="while they are pruned"):
            model(**tiny.prompt(model, 1))
        with pytest.warns(VTPruneWarning, match="never fired"):
            vtprune.remove(model)
        model(**tiny.prompt(model, 1))
    for keep in ("a quarter", 64):
        with pytest.raises(ConfigError, match="is no share"), skiprouter(model, router, keep):  # type: ignore[arg-type]
            pass
    save_file({"first": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ConfigError, match="holds no router: bias, first, second"):
        Router.load(tmp_path / "odd.safetensors")
    for changed, word in (
        ({"bias": torch.zeros(3)}, "holds no router: bias, first"),
        ({"second": torch.zeros(1)}, "holds no router: second"),
        ({"first": torch.full((4, 16, 4), torch.nan)}, "spoilt: first has NaN"),
    ):
        save_file({**router.state_dict(), **changed}, tmp_path / "odd.safetensors")
        with pytest.raises(ConfigError, match=word):
            Router.load(tmp_path / "odd.safetensors")
    with pytest.raises(ConfigError, match="there is no router"):
        Router.load(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        Router.load(tmp_path / "torn.safetensors")
    save_file({**router.state_dict(), "bias": torch.zeros(3)}, tmp_path / "flat.safetensors")
    with pytest.raises(ConfigError, match="holds no router: bias"):
        Router.load(tmp_path / "flat.safetensors")
    save_file(router.state_dict(), tmp_path / "router.safetensors")
    assert torch.equal(Router.load(tmp_path / "router.safetensors").second, router.second)
