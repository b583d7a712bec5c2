"""The export is what `save_pretrained` would write, whoever writes it: all ranks, one of them, or `fullft export`."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
from conftest import FULLFT, Launch, chats, run_ranks, torchrun, write_jsonl, write_recipe
from safetensors.torch import load_file
from test_architectures import CONFIGS, SMALL, save_model
from transformers import AutoConfig, DeepseekV3Config, HrmTextConfig, LlamaConfig, PretrainedConfig

from fullft.export import export_checkpoint

pytestmark = pytest.mark.ranks

MOE = {name: value for name, value in SMALL.items() if name != "head_dim"}
MODELS: dict[str, PretrainedConfig] = CONFIGS | {
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "deepseek v3, experts fused on loading and a buffer in fp32": DeepseekV3Config(
        **MOE, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    ),
}  # fmt: skip
SHARD_GB = 0.001  # 1 MB is the smallest that save_pretrained takes

# Exports models with random weights, and saves them in a checkpoint; the reference is DeepSpeed's own gathering and
# save_pretrained of the whole model.
RANK = """
import sys
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_set_local_fp32_param
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed
from fullft import cluster, engine, export, model
from fullft.saver import Saver
from fullft.tokenizer import load_tokenizer
from fullft.tracking import Tracker
from fullft.optim import build_optimizer
from fullft.recipe import load_recipe
from fullft.shards import allocate_optimizer_states

me = cluster.discover()
cluster.join(me, 5)
for path in sys.argv[1:]:
    recipe = load_recipe(path)
    run = recipe.run_folder
    tokenizer = load_tokenizer(recipe.model)
    meta = model.on_meta(recipe.model, tokenizer)
    geometry = engine.geometry(recipe, me.world_size)
    config = engine.fill_config(engine.read_config(recipe), recipe, geometry, model.facts(meta), torch.float32)
    loaded = model.load(recipe, config, tokenizer)
    started = engine.start(loaded, build_optimizer(loaded, recipe.train, False), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in started.module.parameters():  # weights that bf16 must round; padding too
        padded = torch.randn(parameter.ds_tensor.numel() * me.world_size, generator=generator)
        safe_set_local_fp32_param(parameter, padded.chunk(me.world_size)[me.rank])
    export.export(started, meta, tokenizer, recipe, recipe.export.dtype, "card")
    allocate_optimizer_states(started)
    tracker = Tracker(recipe, me.is_main, 4, 0)
    saver = Saver(started, run / "checkpoints", recipe.checkpoint, tracker, 0)
    saver.copy()
    saver.write({"step": 4})
    saver.wait()
    weights = {
        name: safe_get_full_fp32_param(one).reshape(one.ds_shape) for name, one in started.module.named_parameters()
    }
    del started, loaded
    deepspeed.unset_hf_deepspeed_config()
    if me.is_main:
        (run / "recipe.yaml").write_text(recipe.to_yaml())
        dtype = export.DTYPES[recipe.export.dtype]
        whole = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=dtype)
        for one in whole.parameters():  # transformers keeps some in fp32, which are trained and evaluated in bf16 here
            one.data = one.data.to(dtype)
        whole.load_state_dict({name: one.to(dtype) for name, one in weights.items()}, strict=False)
        whole.save_pretrained(run / "whole", max_shard_size=f"{int(recipe.export.max_shard_gb * 1000)}MB")
cluster.leave()
"""


def ranks(recipes: list[dict[str, Any]], folder: Path, count: int, rank: str = "") -> str:
    """Run RANK on some ranks, which start by the shell command `rank` if given; returns what they print."""
    script = folder / "rank.py"
    script.write_text(RANK)
    paths = [str(write_recipe(recipe, Path(recipe["run_dir"] + ".yaml"))) for recipe in recipes]
    if not rank:
        done = run_ranks(script, *paths, ranks=count, cwd=folder, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done.stdout
    command = [*torchrun(count), "--no-python", "sh", "-c", rank, "sh", sys.executable, str(script), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def wide(config: PretrainedConfig) -> PretrainedConfig:
    """With enough weights for several files of 1 MB, and sizes that 2 and 3 ranks cannot share evenly."""
    config = type(config).from_dict(config.to_dict())
    for name, size in {"intermediate_size": 5003, "n_inner": 5003, "moe_intermediate_size": 1101}.items():
        if hasattr(config, name):
            setattr(config, name, size)
    return config


def prepare(recipe: dict[str, Any], name: str, tiny_model: Path, folder: Path, dtype: str) -> dict[str, Any]:
    """A recipe for a model of MODELS that trains nothing; its weights take more than a file."""
    path = save_model(wide(MODELS[name]), tiny_model, folder / f"model-{name}")
    return recipe | {
        "run_dir": str(folder / f"run-{name}"),
        "model": {"path": str(path)},
        "train": recipe["train"] | {"global_batch_size": 6},
        "export": {"dtype": dtype, "max_shard_gb": SHARD_GB},
    }


def contents(folder: Path, pattern: str = "model*.safetensors*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


@pytest.mark.parametrize(
    ("count", "names", "dtype"),
    [(1, ["llama, tied"], "fp32"), (2, list(MODELS), "bf16"), (3, ["llama, tied", "mixtral"], "fp16")],
)
def test_all_ranks_and_a_checkpoint_give_what_save_pretrained_of_the_whole_model_writes(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, count: int, names: list[str], dtype: str
) -> None:
    known = {name: next(model for model in MODELS if model.startswith(name)) for name in names}
    recipes = [prepare(recipe, known[name], tiny_model, tmp_path, dtype) for name in names]
    printed = ranks(recipes, tmp_path, count)
    assert printed.count("written by all ranks") == len(names)
    for name, run in ((name, Path(one["run_dir"])) for name, one in zip(names, recipes, strict=True)):
        whole = contents(run / "whole")
        assert len(whole) > 1, name
        assert contents(run / "export") == whole, name  # every byte of every file, and the index
        configs = [json.loads((run / folder / "config.json").read_text()) for folder in ("export", "whole")]
        assert configs[0] == configs[1]
        assert not list(run.glob("export*.tmp"))
        found, skipped = export_checkpoint(run, tmp_path / "out" / name)
        assert (found.name, skipped) == ("step-00000004", [])
        for file, content in contents(run / "export", "*").items():
            assert file == "README.md" or (tmp_path / "out" / name / file).read_bytes() == content, file


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs mount namespaces, and root")
def test_a_run_folder_of_each_node_gives_one_whole_export_on_that_of_rank_0(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    one = prepare(recipe, "llama, tied", tiny_model, tmp_path, "bf16")
    Path(one["run_dir"]).mkdir()
    own = f"""exec unshare --mount sh -c 'mount -t tmpfs none "$0" && exec "$@"' "{one["run_dir"]}" "$@" """
    rank = f'[ "$RANK" = 0 ] || {own}; exec "$@"'
    printed = ranks([one], tmp_path, 2, rank)
    run = Path(one["run_dir"])
    assert "written by rank 0, since not all ranks see its run folder" in printed
    assert str(run / "export") in printed
    assert contents(run / "export") == contents(run / "whole")
    assert {path.name for path in (run / "checkpoints/step-00000004").glob("*.distcp")} == {"__0_0.distcp"}


def fullft_export(*words: Any, code: int = 0, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = run_ranks(FULLFT, "export", *map(str, words), ranks=1, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_tensors_that_transformers_computes_on_saving_are_told_and_right(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    # The gate and up projections that it computes with are one tensor in its files.
    config = HrmTextConfig(hidden_size=32, intermediate_size=3001, num_hidden_layers=1, num_attention_heads=2)
    path = save_model(config, tiny_model, tmp_path / "model")
    one = recipe | {"model": {"path": str(path)}, "export": {"dtype": "bf16", "max_shard_gb": SHARD_GB}}
    printed = ranks([one], tmp_path, 2)
    run = Path(one["run_dir"])
    assert "gathered by rank 0, since transformers computes model.H_module" in printed
    assert contents(run / "export") == contents(run / "whole")
    export_checkpoint(run, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(run / "whole")


def test_a_checkpoint_of_a_run_exported_by_command(recipe: dict[str, Any], launch: Launch, tmp_path: Path) -> None:
    """Of the newest step it equals the run's own export; damage is skipped; every error says what to do."""
    recipe["checkpoint"] = {"every_steps": 2, "keep": 3}
    recipe["export"]["dtype"] = "auto"
    recipe["data"]["train"] = [{"path": recipe["data"]["train"], "name": "chats"}]
    held_out = str(write_jsonl(tmp_path / "held-out.jsonl", chats(4)))
    recipe["data"]["validation"] = held_out
    launch(recipe)
    run, out = Path(recipe["run_dir"]), tmp_path / "v1.5"
    done = fullft_export(run, out, cwd=tmp_path)
    assert f"{run}/checkpoints/step-00000004 exported to {out}" in done.stdout
    assert contents(out, "*") == contents(run / "export", "*")
    card = (out / "README.md").read_text()
    assert "| skill | validation | loss |" in card
    assert "| chats |" in card
    assert "100.0%" in card
    assert "4 steps" in card
    assert "<details>" in card

    fullft_export(run, tmp_path / "half", "--dtype", "fp16", "--step", "2", cwd=tmp_path)
    assert AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.float16
    half, last = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", out))
    assert all(one.dtype == torch.float16 for one in half.values())
    assert any((half[name] != last[name].half()).any() for name in half)  # another step
    assert "2 steps" in (tmp_path / "half" / "README.md").read_text()

    newest = run / "checkpoints" / "step-00000004"
    file = newest / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    done = fullft_export(run, tmp_path / "older", cwd=tmp_path)
    assert f"skipped checkpoint {newest}: __1_0.distcp does not match its checksum" in done.stdout
    assert "step-00000002 exported" in done.stdout

    for words, message in (
        ((run, out), f"{out} exists, nothing is overwritten"),
        ((out, tmp_path / "new"), "is not a run folder of fullft (it has no recipe.yaml)"),
        ((run, tmp_path / "new", "--step", "3"), "those of .* are step-00000002, step-00000004"),
        ((run, tmp_path / "new", "--step", "4"), "no checkpoint is whole"),
        ((run, tmp_path / "new", "--push-to-hub", "someone/tuned"), "HF_HUB_OFFLINE is set"),
    ):
        done = fullft_export(*words, code=2, cwd=tmp_path)
        assert re.search(message if ".*" in message else re.escape(message), done.stderr)
        assert "nothing was exported" in done.stderr
    assert not list(tmp_path.glob("new*"))


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as an upload of small files speaks: they come in the commit itself."""

    commits: ClassVar[list[bytes]] = []
    made: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://{self.headers['Host']}/someone/tuned"
        answer: dict[str, Any] = {}
        match self.path:
            case "/api/repos/create":
                self.made.append(json.loads(body))
                answer = {"url": here}
            case "/api/models/someone/tuned/preupload/main":
                names = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            case "/api/models/someone/tuned/commit/main":
                self.commits.append(body)
                answer = {"commitUrl": f"{here}/commit/1", "commitOid": "1", "pullRequestUrl": None}
        self._answer(200, answer)

    def do_GET(self) -> None:
        self._answer(404, {})

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def test_uploads_the_export_and_never_fails_a_run_by_it(
    recipe: dict[str, Any], launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    recipe["train"]["steps"] = 1
    recipe["export"]["push_to_hub"] = "someone/tuned"
    run = Path(recipe["run_dir"])
    done = launch(recipe)
    assert f"uploaded: http://127.0.0.1:{server.server_port}/someone/tuned/commit/1" in done.stdout
    (made,) = Hub.made
    assert (made["name"], made["organization"]) == ("tuned", "someone")
    sent = [json.loads(line) for line in Hub.commits[0].splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in sent if line["key"] == "file"
    }
    assert files == contents(run / "export", "*")
    server.shutdown()
    server.server_close()

    recipe["run_dir"] = str(tmp_path / "again")
    done = launch(recipe)  # nobody listens now
    assert f"hf upload someone/tuned {tmp_path / 'again' / 'export'}" in done.stderr
    assert json.loads((tmp_path / "again" / "state.json").read_text())["status"] == "done"
    done = fullft_export(run, tmp_path / "out", "--push-to-hub", "someone/tuned", code=1, cwd=tmp_path)
    assert f"hf upload someone/tuned {tmp_path / 'out'}" in done.stderr
    assert contents(tmp_path / "out") == contents(run / "export")


def test_an_upload_without_a_token_is_told_on_the_login_node(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["export"]["push_to_hub"] = "someone/tuned"
    command = [sys.executable, "-m", "fullft.cli", "check", str(write_recipe(recipe, tmp_path / "recipe.yaml"))]
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment["HF_HOME"] = str(tmp_path / "home")  # of a person who is not logged in
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 2
    assert "there is no token to upload someone/tuned with; run `hf auth login`" in done.stderr


def test_a_full_disk_is_told_before_a_weight_is_written(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    one = prepare(recipe, "llama, tied", tiny_model, tmp_path, "fp32")
    ranks([one], tmp_path, 1)
    small = (
        f"mount -t tmpfs -o size=900k none out && exec {sys.executable} -m fullft.cli export '{one['run_dir']}' out/x"
    )
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", small],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Nothing is lost: make room" in done.stderr


# Not ru_maxrss of the child: it starts with that of the process which forked it.
EXPORT_AND_TELL_PEAK = "from fullft import cli; cli.main(); print(open('/proc/self/status').read())"


@pytest.mark.slow
def test_a_checkpoint_is_exported_in_memory_that_the_model_does_not_matter_for(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8
    )
    recipe["export"] = {"dtype": "bf16", "max_shard_gb": 0.1}
    peaks, sizes = [], []
    for name, path in (("small", tiny_model), ("large", save_model(config, tiny_model, tmp_path / "model"))):
        one = recipe | {"run_dir": str(tmp_path / name), "model": {"path": str(path)}}
        ranks([one], tmp_path, 2)
        command = [sys.executable, "-c", EXPORT_AND_TELL_PEAK, "export", tmp_path / name, tmp_path / f"{name}-out"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        peaks.append(int(done.stdout.split("VmHWM:")[1].split()[0]) / 1024)
        sizes.append(sum(file.stat().st_size for file in (tmp_path / name / "export").glob("*.safetensors")) / 2**20)
    print(f"peaks {peaks} MiB for weights of {sizes} MiB")
    assert sizes[1] > 190
    assert peaks[1] - peaks[0] < 60  # two halves of the largest parameter in fp32 are 11 MiB; and blocks of 16 MiB
