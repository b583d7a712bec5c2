"""The base model: what can be known of it without loading it, and loading it into ZeRO-3 shards."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations import HfDeepSpeedConfig

from fullft.errors import BadInput
from fullft.recipe import Model, Recipe
from fullft.tokenizer import first_line, require_folder

_SHOWN = 5


@dataclass(frozen=True)
class Facts:
    """What a model's config alone tells."""

    architecture: str
    parameters: int
    largest_parameter: int  # elements
    hidden_size: int
    vocabulary_size: int
    layers: int


def device() -> str:
    """`cuda:N` of this rank, or `cpu`."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().current_device_name())


def precision(recipe: Recipe, on_gpu: bool | None = None) -> torch.dtype:
    """dtype of weights and activations in forward and backward; the optimizer always updates fp32 weights.

    `on_gpu` says where the run will be, if not here.
    """
    if on_gpu is None:
        from deepspeed.accelerator import get_accelerator  # half a second that `fullft check` has no use for

        on_gpu = get_accelerator().device_name() != "cpu"
    chosen = recipe.train.precision if recipe.train.precision != "auto" else ("bf16" if on_gpu else "fp32")
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[chosen]


def export_dtype(recipe: Recipe) -> torch.dtype:
    """dtype of the exported weights."""
    chosen = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return chosen.get(recipe.export.dtype, precision(recipe))


def on_meta(model: Model) -> PreTrainedModel:
    """The model without storage, from its config alone.

    Raises:
        BadInput: the config is missing or no causal language model.
    """
    require_folder(model)
    try:
        config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        # The flash packages may be on the GPU nodes only; whether the architecture has sdpa is known here.
        attention = model.attention if model.attention in ("sdpa", "eager") else "eager"
        with torch.device("meta"):
            built: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=model.trust_remote_code, attn_implementation=attention
            )
    except Exception as error:  # as above
        advice = f"; model.attention is {model.attention}, try eager" if "attention" in str(error) else ""
        reason = first_line(error)
        raise BadInput(f"model.path: {model.path} cannot be built from its config: {reason}{advice}") from None
    return built


def facts(model: PreTrainedModel) -> Facts:
    """Sizes of a model; shapes are enough."""
    sizes = [math.prod(parameter.shape) for parameter in model.parameters()]
    config = model.config.get_text_config()
    return Facts(
        architecture=type(model).__name__, parameters=sum(sizes), largest_parameter=max(sizes),
        hidden_size=int(config.hidden_size), vocabulary_size=int(config.vocab_size),
        layers=int(config.num_hidden_layers),
    )  # fmt: skip


def weight_problems(model: Model, meta: PreTrainedModel) -> list[str]:
    """Tensors of a local folder that do not fit the config, from the headers of its safetensors files.

    Models whose files hold other tensors than the model (experts fused on loading) are left to transformers.
    """
    folder = Path(model.path)
    steps = get_model_conversion_mapping(meta)
    if not folder.is_dir() or any(isinstance(step, WeightConverter) for step in steps):
        return []
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return [] if list(folder.glob("*.bin")) else [f"model.path: {folder} holds no weights (*.safetensors)"]
    found: dict[str, list[int]] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            return [f"model.path: {file} cannot be read, is it complete? {error}"]
    wanted = {name: list(tensor.shape) for name, tensor in meta.state_dict().items()}
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    found = {
        rename_source_key(name, renamings, [], meta.base_model_prefix, wanted)[0]: shape
        for name, shape in found.items()
    }
    tied = set(meta.all_tied_weights_keys)
    missing = [name for name in wanted if name not in found and name not in tied]
    misshaped = [
        f"{name} {found[name]}, config says {wanted[name]}"
        for name in wanted
        if found.get(name, wanted[name]) != wanted[name]
    ]
    ignored = [*(meta._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"\.attn\.(masked_)?bias"]
    surplus = [name for name in found if name not in wanted and not any(re.search(rule, name) for rule in ignored)]
    problems = []
    for what, names in (
        ("lack tensors", missing),
        ("have tensors that the model has not", surplus),
        ("have tensors of other shapes", misshaped),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            problems.append(
                f"model.path: config and weights of {folder} disagree: the files {what}: "
                f"{'; '.join(names[:_SHOWN])}{more}"
            )
    return problems


def load(recipe: Recipe, deepspeed_config: dict[str, Any]) -> PreTrainedModel:
    """The base model, loaded into ZeRO-3 shards by transformers (all ranks together).

    Every parameter is trainable.

    Raises:
        BadInput: the weights do not fit the config.
    """
    # from_pretrained builds under zero.Init if this object exists; it holds a weak reference, so we keep a strong one.
    handle = HfDeepSpeedConfig(deepspeed_config)
    dtype = precision(recipe)
    model, report = AutoModelForCausalLM.from_pretrained(
        recipe.model.path, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code,
        attn_implementation=recipe.model.attention, dtype=dtype, output_loading_info=True,
    )  # fmt: skip
    model.fullft_deepspeed_handle = handle
    if bad := sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]:
        raise BadInput(f"model.path: weights of {recipe.model.path} do not fit its config: {'; '.join(bad[:_SHOWN])}")
    model.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if parameter.ds_tensor.dtype != dtype:
            raise RuntimeError(f"{name} was loaded as {parameter.ds_tensor.dtype}, not {dtype}")
    if recipe.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


@torch.no_grad()
def require_documents_apart(engine: Any, attention: str, micro_batch_size: int) -> None:
    """Run two packed documents, change the first, and see that the logits of the second stay. All ranks together.

    In a micro-batch of the real size: what transformers makes of position ids depends on it.

    Attention that ignores the document borders in position ids would train on contaminated context without a word.

    Raises:
        BadInput: they do not stay.
    """
    engine.eval()
    second = [1, 2, 3, 4]
    positions = torch.tensor([[0, 1, 2, 3] * 2] * micro_batch_size, device=engine.device)
    logits = []
    for first in ([5, 6, 7, 5], [6, 5, 6, 7]):
        ids = torch.tensor([first + second] * micro_batch_size, device=engine.device)
        logits.append(engine(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 4:].float())
    engine.train()
    change = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp(min=1e-6))
    round_off = 1e-3 if next(engine.module.parameters()).dtype == torch.float32 else 3e-2  # bf16 has 8 bits
    if change > round_off:
        raise BadInput(
            f"model.attention: with {attention}, {type(engine.module).__name__} lets packed documents see each other "
            f"(logits change by {change:.1%}); choose another attention, or data.packing=false"
        )
