# SPDX-License-Identifier: Apache-2.0
"""The doctor finds what is there, says what is not, and notices what does not work."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from conformance.helpers import FP32, forward_error, hooks
from conformance.reference import Reference

import vtprune
from vtprune import cli, doctor, models
from vtprune.doctor import Check, examine
from vtprune.models.internvl import InternVL


def states(checks: Sequence[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["doctor", *arguments])
    return code, capsys.readouterr().out


def test_an_embedded_model_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = printed(capsys, "pocket-llava", "--json", "--device", "cpu")
    checks = json.loads(out)["checks"]
    assert code == 0 and {check["state"] for check in checks} == {"ok"}
    assert [check["name"] for check in checks[-3:]] == ["generate", "prune inside", "remove"]


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MORE])
def test_every_supported_family_passes(family: str) -> None:
    model = tiny.build(family)
    model(**tiny.prompt(model, 1))
    before = hooks(model)
    checks = examine(model, tiny.prompt(model, 2))
    assert set(states(checks).values()) == {"ok"}, checks
    assert hooks(model) == before
    assert ("DeepStack" in states(checks)) == (family == "qwen3_vl")


def save(config: Any, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


def test_a_config_is_enough_for_a_first_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = printed(capsys, save(tiny.build("idefics3").config, tmp_path))
    assert code == 0 and re.search(r"^family +ok +Idefics3", out, re.MULTILINE)
    assert re.search(r"^runs +not tried", out, re.MULTILINE)


def test_gemma_3_is_told_why_it_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = dict(num_hidden_layers=7, hidden_size=32, intermediate_size=64, num_attention_heads=4, head_dim=8)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    code, out = printed(capsys, save(config, tmp_path), "--json")
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 1
    wrong = {name for name, check in found.items() if check["state"] == "no"}
    assert wrong >= {"causal mask", "inside the text model", "family"}
    assert wrong <= {
        "causal mask",
        "inside the text model",
        "family",
        "positions",
    }  # older transformers: two embeddings
    assert (
        "both directions" in found["causal mask"]["note"]
        and "[0, 1, 2, 3, 4, 6]" in found["inside the text model"]["note"]
    )


def test_a_folder_without_a_vision_language_model_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1)
    assert cli.main(["doctor", save(config, tmp_path)]) == 2
    assert "cannot read a vision-language model" in capsys.readouterr().err


def test_a_text_model_lacks_nearly_everything() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1)
    checks = examine(transformers.LlamaForCausalLM(config), {"input_ids": torch.ones(1, 2, dtype=torch.long)})
    found = states(checks)
    assert all(found[name] == "no" for name in ("model type", "text model", "encoder", "placeholders", "projector"))
    assert found["family"] == "no" and found["runs"] == "not tried"


def test_an_unknown_family_is_run_without_being_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "FAMILIES", tuple(f for f in models.FAMILIES if f is not InternVL))
    model = tiny.build("internvl")
    checks = examine(model, tiny.prompt(model, 2))
    found = states(checks)
    assert found["one to one"] == found["mask"] == found["runs"] == "ok"
    assert [name for name, state in found.items() if state == "no"] == ["family"] and "prune" not in found


def test_rows_that_do_not_match_placeholders_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("internvl")
    sample = tiny.prompt(model, 1)
    features = type(model.model).get_image_features

    def turned(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = features(self, *args, **kwargs)
        return replace(out, pooler_output=out.pooler_output.flip(0)) if hasattr(out, "pooler_output") else out.flip(0)

    lm = model.model.language_model
    lm.register_forward_pre_hook(
        lambda _m, args, kw: (args, {**kw, "inputs_embeds": kw["inputs_embeds"].roll(1, 1)}), with_kwargs=True
    )
    assert states(examine(model, sample))["one to one"] == "no"


def test_a_family_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = InternVL.layouts
    monkeypatch.setattr(InternVL, "layouts", lambda *a: [replace(v, length=v.length - 1) for v in layouts(*a)])
    model = tiny.build("internvl")
    checks = examine(model, tiny.prompt(model, 1))
    found = {check.name: check for check in checks}
    assert found["prune"].state == "no" and "placeholders" in found["prune"].note and found["remove"].state == "ok"


def test_an_engine_that_changes_logits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("internvl")
    sample = tiny.prompt(model, 1)
    apply = doctor.api.apply

    def worse(model: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        return apply(model, *args, **kwargs)

    monkeypatch.setattr(doctor.api, "apply", worse)
    found = states(examine(model, sample))
    assert found["keep everything"] == found["packing"] == found["remove"] == "no"


def test_the_family_in_the_guide_works(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs/add-a-family.md").read_text(encoding="utf-8")
    module = types.ModuleType("vipllava")
    exec(re.search(r"```python\n(# SPDX.*?)```", text, re.DOTALL)[1], module.__dict__)
    llava = tiny.build("llava")
    config = transformers.VipLlavaConfig(
        vision_config=llava.config.vision_config,
        text_config=llava.config.text_config,
        image_token_index=tiny.IMAGE,
        vision_feature_layers=[-2, -1],
    )
    model, twin = (transformers.VipLlavaForConditionalGeneration(config).eval() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    sample = tiny.prompt(llava, 2)
    assert states(examine(model, sample))["family"] == "no"
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, module.VipLlava))
    assert set(states(examine(model, sample)).values()) == {"ok"}, examine(model, sample)
    assert vtprune.encode(model, sample).seg_grid == ((4, 4), (4, 4))
    with vtprune.apply(model, "norm", keep=0.4):
        assert forward_error(model, Reference(twin), [sample], sample, "norm") <= FP32
