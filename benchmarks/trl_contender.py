"""TRL's SFTTrainer as a contender of benchmarks.step, set up as its users would; fullft need not be installed.

python benchmarks/trl_contender.py SETTINGS.json --turns FD
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)
from benchmarks.turns import Ended, Turns  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=Path, help="made by benchmarks.step")
    parser.add_argument("--turns", type=int, required=True)
    arguments = parser.parse_args()
    turns, settings = Turns(arguments.turns), json.loads(arguments.settings.read_text())

    import deepspeed.ops

    cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # 27 s of compiling, for inference only
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1 if cpu else torch.get_num_threads())
    config = SFTConfig(
        output_dir=settings["folder"], max_steps=settings["steps"], use_cpu=cpu, bf16=not cpu,
        packing=True, max_length=settings["sequence_length"],
        # Packed by fullft, so that both see the same sequences in the same order; the labels come with them.
        dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential",
        per_device_train_batch_size=settings["micro_batch_size"],
        gradient_accumulation_steps=settings["accumulation"], gradient_checkpointing=settings["checkpointing"],
        deepspeed=settings["deepspeed"], learning_rate=settings["learning_rate"], lr_scheduler_type="constant",
        adam_beta1=settings["betas"][0], adam_beta2=settings["betas"][1], weight_decay=0.0,
        max_grad_norm=settings["max_grad_norm"], logging_steps=1, report_to="none", save_strategy="no",
        disable_tqdm=True, seed=settings["seed"],
        model_init_kwargs={"attn_implementation": attention_of(cpu), "dtype": "float32" if cpu else "bfloat16"},
    )  # fmt: skip

    class Callback(TrainerCallback):
        losses: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.step_begins()

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    trainer = SFTTrainer(
        settings["model"], args=config, processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        train_dataset=load_dataset("parquet", data_files=settings["sequences"], split="train",
                                   cache_dir=f"{settings['folder']}/hub-{os.environ['RANK']}"),
        callbacks=[Callback()],
    )  # fmt: skip
    turns.in_use = {
        "attention": trainer.model.config._attn_implementation, "kernels": "none", "mlp_tiles": 1,
        "activation_checkpointing": "full" if settings["checkpointing"] else "none",
        "state_bytes": settings["state_bytes"],
    }  # fmt: skip
    try:
        trainer.train()
    except Ended:
        turns.end(losses=Callback.losses, trl=version("trl"))
    raise RuntimeError("the run ended before its last turn")


def attention_of(cpu: bool) -> str:
    """The best that is installed: with sdpa a packed sequence needs a dense mask."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if cpu:
        return "sdpa"
    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


if __name__ == "__main__":
    main()
