"""TRL's SFTTrainer for benchmarks.peers, as its documentation sets it up; fullft need not be installed.

torchrun … benchmarks/trl_peer.py SETTINGS.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # here are an io.py and a data.py


def main() -> None:
    import deepspeed.ops

    settings = json.loads(Path(sys.argv[1]).read_text())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # 27 s of compiling, for inference only
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    config = SFTConfig(
        output_dir=settings["folder"], max_steps=settings["steps"], use_cpu=True, bf16=False,
        max_length=settings["sequence_length"], train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": settings["has_labels"]},
        per_device_train_batch_size=settings["micro_batch_size"],
        gradient_accumulation_steps=settings["accumulation"], deepspeed=settings["deepspeed"],
        learning_rate=settings["learning_rate"], lr_scheduler_type="constant", adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1], weight_decay=0.0, max_grad_norm=settings["max_grad_norm"], logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True, seed=settings["seed"],
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip

    class Callback(TrainerCallback):
        losses: list[float] = []  # noqa: RUF012
        at: list[float] = []  # noqa: RUF012

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))
                self.at.append(time.monotonic())

    rank = os.environ["RANK"]
    kind = "parquet" if settings["has_labels"] else "json"
    rows = load_dataset(kind, data_files=settings["rows"], split="train", cache_dir=f"{settings['folder']}/hub-{rank}")
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    trainer = SFTTrainer(
        settings["model"], args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[Callback()]
    )
    trainer.train()
    if rank == "0":
        batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
        trained = [{"input_ids": one["input_ids"][0].tolist(), "labels": one["labels"][0].tolist()} for one in batches]
        found = {"losses": Callback.losses, "at": Callback.at, "rows": trained, "trl": version("trl")}
        Path(settings["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
