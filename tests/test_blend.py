"""A blend is base + α (tuned - base), tensor by tensor, in bounded memory; what cannot be blended is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file, save_file
from test_architectures import SMALL, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config

from fullft import cli
from fullft.errors import BadInput
from fullft.retention.blend import blend_folders, pairs_of_files, with_scales
from fullft.retention.sweep import best, parse_alphas, point


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def tuned_of(base: Path, folder: Path, **changes: Any) -> Path:
    """The model of a folder with other weights; `changes` are of save_pretrained."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=changes.pop("dtype", torch.float32))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 10
    model.save_pretrained(folder, **changes)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(LlamaConfig(**SMALL), tiny_model, tmp_path_factory.mktemp("blend") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    """In several files."""
    return tuned_of(base, base.parent / "tuned", max_shard_size="30KB")


def test_a_blend_is_between_the_two(base: Path, tuned: Path, tmp_path: Path) -> None:
    size = blend_folders(str(base), str(tuned), tmp_path / "blend", 0.3)
    before, after, blended = (tensors(folder) for folder in (base, tuned, tmp_path / "blend"))
    assert before.keys() == after.keys() == blended.keys()
    for name, values in blended.items():
        torch.testing.assert_close(values, before[name] + 0.3 * (after[name] - before[name]), rtol=1e-6, atol=1e-7)
    files = sorted(path.name for path in tuned.glob("model*"))
    assert len(files) > 2
    assert files == sorted(path.name for path in (tmp_path / "blend").glob("model*"))
    assert size == sum(file.stat().st_size for file in (tmp_path / "blend").glob("*.safetensors"))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "blend", output_loading_info=True)
    assert not report["missing_keys"]
    assert AutoTokenizer.from_pretrained(tmp_path / "blend").chat_template
    torch.testing.assert_close(loaded.lm_head.weight, blended["lm_head.weight"])
    card = (tmp_path / "blend" / "README.md").read_text()
    assert "+ 0.3 ×" in card
    assert str(base) in card
    assert str(tuned) in card
    assert [path.name for path in tmp_path.iterdir()] == ["blend"]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_are_the_bits_of_base_and_tuned(base: Path, tuned: Path, tmp_path: Path, alpha: float) -> None:
    odd = tensors(base)
    odd["model.norm.weight"][:2] = torch.tensor([-0.0, torch.inf])
    other = tuned_of(base, tmp_path / "odd")
    save_file(odd, other / "model.safetensors", {"format": "pt"})
    first, second = (str(other), str(tuned)) if alpha == 0 else (str(tuned), str(other))
    blend_folders(first, second, tmp_path / "blend", alpha)
    for name, values in tensors(tmp_path / "blend").items():
        assert torch.equal(values.view(torch.int32), odd[name].view(torch.int32)), name


def test_dtypes_may_differ_and_a_blend_is_rounded_once(base: Path, tmp_path: Path) -> None:
    half = tuned_of(base, tmp_path / "half", dtype=torch.bfloat16)
    blend_folders(str(base), str(half), tmp_path / "blend", 0.7)
    before, after = tensors(base), tensors(half)
    for name, values in tensors(tmp_path / "blend").items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, torch.lerp(before[name], after[name].float(), 0.7).bfloat16()), name
    blend_folders(str(half), str(base), tmp_path / "back", 0.0)
    assert all(torch.equal(values, after[name].float()) for name, values in tensors(tmp_path / "back").items())


def test_rows_of_new_tokens_start_as_the_mean_of_the_base(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = model.lm_head.weight.shape[0]
    model.resize_token_embeddings(rows + 3)
    model.save_pretrained(tmp_path / "grown")
    grown, before = tensors(tmp_path / "grown"), tensors(base)
    for alpha in (0.0, 0.5):
        blend_folders(str(base), str(tmp_path / "grown"), tmp_path / f"{alpha}", alpha)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            values, mean = tensors(tmp_path / f"{alpha}")[name], before[name].mean(0)
            torch.testing.assert_close(values[:rows], before[name])
            expected = torch.lerp(mean.expand(3, -1), grown[name][rows:], alpha)
            torch.testing.assert_close(values[rows:], expected, rtol=1e-5, atol=1e-7)


def test_tensors_are_matched_as_transformers_loads_them(tiny_model: Path, tmp_path: Path) -> None:
    """The same weights under other names, and tied ones that one of the two has twice."""
    base = save_model(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64), tiny_model, tmp_path / "base")
    tuned = tuned_of(base, tmp_path / "tuned")
    short = {name.removeprefix("transformer."): values for name, values in tensors(base).items()}
    save_file(short | {"lm_head.weight": short["wte.weight"].clone()}, base / "model.safetensors", {"format": "pt"})
    blend_folders(str(base), str(tuned), tmp_path / "blend", 0.5)
    blended, after = tensors(tmp_path / "blend"), tensors(tuned)
    assert blended.keys() == after.keys()
    for name, values in blended.items():
        torch.testing.assert_close(values, torch.lerp(short[name.removeprefix("transformer.")], after[name], 0.5))
    save_file(short | {"lm_head.weight": short["wte.weight"] + 1}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="different tensors"):
        blend_folders(str(base), str(tuned), tmp_path / "other", 0.5)


def test_experts_are_blended_as_they_are_stored(tiny_model: Path, tmp_path: Path) -> None:
    config = MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    base = save_model(config, tiny_model, tmp_path / "base")
    tuned = tuned_of(base, tmp_path / "tuned")
    blend_folders(str(base), str(tuned), tmp_path / "blend", 0.5)
    before, after = tensors(base), tensors(tuned)
    assert any("experts" in name for name in before)
    for name, values in tensors(tmp_path / "blend").items():
        torch.testing.assert_close(values, torch.lerp(before[name], after[name], 0.5))


def test_layers_have_shares_of_alpha(base: Path, tuned: Path, tmp_path: Path) -> None:
    words = ["0-=0.2..1", "1=0.5", "*.mlp.*=0", "lm_head.weight=0.1"]
    scales = {name: pair.scale for name, pair in with_scales(pairs_of_files(base, tuned), words).items()}
    assert scales["model.layers.0.self_attn.q_proj.weight"] == 0.2
    assert scales["model.layers.1.self_attn.q_proj.weight"] == 0.5
    assert scales["model.layers.1.mlp.up_proj.weight"] == 0
    assert scales["lm_head.weight"] == 0.1
    assert scales["model.norm.weight"] == 1
    blend_folders(str(base), str(tuned), tmp_path / "blend", 0.5, ["*.mlp.*=0"])
    blended, before, after = tensors(tmp_path / "blend"), tensors(base), tensors(tuned)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(blended[name], before[name])
    torch.testing.assert_close(blended["lm_head.weight"], (before["lm_head.weight"] + after["lm_head.weight"]) / 2)
    with pytest.raises(BadInput) as error:
        with_scales(pairs_of_files(base, tuned), ["9=0.5", "embed=1", "0-1=2", "0.5", "*=0..1"])
    assert len(error.value.problems) == 5


def test_all_that_does_not_belong_together_is_named(base: Path, tuned: Path, tiny_model: Path, tmp_path: Path) -> None:
    def problems(first: Path, second: Path, out: Path = tmp_path / "out", alpha: float = 0.5) -> str:
        with pytest.raises(BadInput) as error:
            blend_folders(str(first), str(second), out, alpha)
        assert not list(tmp_path.glob("out*"))
        return str(error.value)

    qwen = save_model(Qwen3Config(**SMALL), tiny_model, tmp_path / "qwen")
    assert "not the same architecture: model_type 'llama' and 'qwen3'" in problems(base, qwen)
    wide = save_model(LlamaConfig(**SMALL | {"intermediate_size": 96}), tiny_model, tmp_path / "wide")
    told = problems(base, wide)
    assert "model.layers.0.mlp.up_proj.weight is [64, 32] in the base, [96, 32] in the tuned model" in told
    assert "model.layers.1.mlp.down_proj.weight" in told
    deep = save_model(LlamaConfig(**SMALL | {"num_hidden_layers": 3}), tiny_model, tmp_path / "deep")
    assert f"{base} lacks tensors of the other model: model.layers.2" in problems(base, deep)
    assert f"{base} lacks tensors of the other model: model.layers.2" in problems(deep, base)
    tied = save_model(LlamaConfig(**SMALL, tie_word_embeddings=True), tiny_model, tmp_path / "tied")
    assert f"{tied} lacks tensors of the other model: lm_head.weight" in problems(base, tied)
    quantized = tensors(base)
    quantized["model.norm.weight"] = quantized["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(quantized, tied / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight is stored as F8_E4M3" in problems(base, tied)
    assert "is not a folder" in problems(tmp_path / "nowhere", tuned)
    assert "--alpha: 1.5 is not between" in problems(base, tuned, alpha=1.5)
    (tied / "model.safetensors").unlink()
    assert "holds no weights" in problems(tied, tuned)
    assert "nothing is overwritten" in problems(base, tuned, out=qwen)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """The peak of a blend of 2 x 537 MB, nearly all of it in one tensor, above that of a tiny one."""
    script = """
import resource, sys
from pathlib import Path
import torch
from fullft.retention.blend import blend_folders
from fullft.weights import create, new_file

def peak(rows):
    here = Path(sys.argv[1]) / str(rows)
    for name in ("base", "tuned"):
        (here / name).mkdir(parents=True)
        (here / name / "config.json").write_text('{"model_type": "llama"}')
        create(new_file(here / name / "model.safetensors", {"a": torch.empty(rows, 1024, device="meta")}))
    blend_folders(str(here / "base"), str(here / "tuned"), here / "out", 0.5)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

print(-peak(16) + peak(1 << 17))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=240
    )
    assert (tmp_path / "131072" / "out" / "model.safetensors").stat().st_size > 5e8
    assert int(done.stdout.split()[-1]) < 128e6


# The command


def test_a_run_folder_knows_its_base(
    base: Path, tuned: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = Path(recipe["run_dir"]), tmp_path / "blend"
    run.mkdir()
    recipe["model"]["path"] = str(base)
    write_recipe(recipe, run / "recipe.yaml")

    def fullft(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fullft", "blend", *words])
        return cli.main()

    assert fullft(str(run), str(out), "--alpha", "0.5") == 2  # no export yet
    (run / "export").symlink_to(tuned)
    assert fullft(str(run), str(out), "--alpha", "0.5", "--layer-scale", "lm_head.weight=0") == 0
    assert torch.equal(tensors(out)["lm_head.weight"], tensors(base)["lm_head.weight"])
    assert fullft(str(run), str(out), "--alpha", "0.5") == 2  # exists
    assert fullft(str(tuned), str(tmp_path / "other"), "--alpha", "0.5") == 2  # no run folder: base unknown
    assert fullft(str(run), str(tmp_path / "other")) == 2  # no alpha
    assert fullft(str(run), str(run / "recipe.yaml" / "blend"), "--alpha", "0.5") == 2  # cannot be made
    assert fullft(str(run), str(tmp_path / "other"), "--alpha", "1", "--recipe", "r.yaml") == 2


# The best of a sweep


def task(measures: str, score: float, base: float, limit: float | None = None) -> dict[str, Any]:
    return {
        "measures": measures, "higher_is_better": True, "score": score, "base": base, "drop": base - score,
        "limit": limit,
    }  # fmt: skip


def points(skill: list[float], retention: list[float], limit: float) -> list[dict[str, Any]]:
    return [
        point(number / 4, {"new": task("skill", one, skill[0]), "old": task("retention", two, retention[0], limit)})
        for number, (one, two) in enumerate(zip(skill, retention, strict=True))
    ]


def test_the_best_blend_has_the_most_skill_within_the_limits() -> None:
    found = points([0, 0.2, 0.6, 0.7, 0.8], [0.9, 0.9, 0.89, 0.8, 0.6], limit=0.02)
    chosen = best(found)
    assert chosen["alpha"] == 0.5
    assert "beyond a limit: 0.75, 1" in chosen["why"]
    assert "skill +60.0 %, retention -1.0 %" in chosen["why"]
    assert (
        best(points([0, 0.2, 0.8, 0.8, 0.8], [0.9] * 5, limit=0.02))["alpha"] == 0.5
    )  # of equals the one that moves least


def test_the_best_blend_is_the_knee_if_every_skill_costs_too_much() -> None:
    chosen = best(points([0, 0.3, 0.7, 0.75, 0.8], [0.9, 0.85, 0.8, 0.5, 0.1], limit=0.02))
    assert chosen["alpha"] == 0.5
    assert "knee" in chosen["why"]
    assert "loses more on old" in chosen["why"]


def test_the_best_blend_is_the_base_if_nothing_was_gained_or_known() -> None:
    assert best(points([0.5, 0.4, 0.3, 0.2, 0.1], [0.9, 0.9, 0.9, 0.9, 0.8], limit=0.02))["alpha"] == 0
    unknown = points([0, 1, 1, 1, 1], [1, 1, 1, 1, 1], limit=0.02)
    for one in unknown[1:]:
        one["skill"] = None
    assert best(unknown)["alpha"] == 0


def test_alphas() -> None:
    assert parse_alphas("1,0.1,0.5") == [0, 0.1, 0.5, 1]
    for text in ("0", "a,b", "0,2", "0,nan", "0.00001,1", ""):
        with pytest.raises(BadInput, match="--sweep"):
            parse_alphas(text)


def test_blend_json_names_are_those_of_the_report() -> None:
    found = point(0.5, {"new": task("skill", 0.6, 0.2), "old": task("retention", 0.5, 0.6, 0.02)})
    assert json.loads(json.dumps(found)).keys() == {"alpha", "skill", "retention", "tasks"}
    assert found["skill"] == pytest.approx(0.4)
    assert found["retention"] == pytest.approx(-0.1)
