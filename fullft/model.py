"""The base model: what can be known of it without loading it, and loading it into ZeRO-3 shards."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fullft.attention import Heads, try_layers, use_best_kernel
from fullft.documents import VARLEN, Documents, documents_arguments
from fullft.errors import BadInput
from fullft.optim import layer_of
from fullft.recipe import Model, Recipe
from fullft.shards import make_empty_shards, own_part, why_not_by_shards
from fullft.tokenizer import files, first_line, vocabulary_rows
from fullft.weights import Part, Stored, Weights, locate, mean_row, read_parts

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
    largest_layer: int  # elements of all parameters of a decoder layer
    vocabulary_parameters: int  # elements of embedding and head, once if tied
    largest_vector: int  # elements of the largest norm or bias
    smallest_matrix: int
    sizes: tuple[int, ...] = ()  # elements of each parameter; empty: not known


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


def _from_config(
    model: Model, tokenizer: PreTrainedTokenizerBase | None, attention: str, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Raises BadInput when the config is missing or no causal language model."""
    folder = files(model)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
        text = config.get_text_config()
        if tokenizer is not None:
            text.vocab_size = vocabulary_rows(model, tokenizer, text.vocab_size)
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=model.trust_remote_code, attn_implementation=attention, dtype=dtype
        )
        if (folder / "generation_config.json").exists():
            built.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # as above
        advice = f"; model.attention is {attention}, try eager" if "attention" in str(error) else ""
        reason = first_line(error)
        raise BadInput(f"model.path: {model.path} cannot be built from its config: {reason}{advice}") from None
    return built


def on_meta(model: Model, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """The model without storage, from its config alone; with the tokenizer's new tokens.

    Raises:
        BadInput: the config is missing or no causal language model.
    """
    # The flash packages may be on the GPU nodes only; whether the architecture has sdpa is known here.
    attention = model.attention if model.attention in ("sdpa", "eager") else "eager"
    with torch.device("meta"):
        return _from_config(model, tokenizer, attention, None)


@dataclass(frozen=True)
class Attention:
    """Which implementation of transformers runs the attention."""

    name: str
    reason: str
    layers: tuple[Heads, ...] = ()  # of `varlen`, those that differ


def attention_of(model: Model) -> Attention:
    """What model.attention stands for, found by running the model on the meta device.

    Raises:
        BadInput: it is varlen, and the model wants of its attention what that has not; or its config is bad.
    """
    if model.attention not in ("auto", VARLEN):
        return Attention(model.attention, "as model.attention says")
    with torch.device("meta"):
        try:
            # In bf16: there are kernels for it alone whose shapes the meta device asks for.
            layers = try_layers(lambda name: _from_config(model, None, name, torch.bfloat16))
            reason = "documents are attended to one by one, without a mask"
            return Attention(VARLEN, reason, tuple(dict.fromkeys(layers)))
        except Exception as error:  # of the model's own code: it is not made for this
            why = f"{VARLEN} is not possible ({first_line(error)})"
        if model.attention == VARLEN:
            raise BadInput(f"model.attention: {why}; auto takes what the model has")
        has_sdpa = on_meta(model)._supports_sdpa
    return Attention("sdpa" if has_sdpa else "eager", f"{why}, and packed documents need a mask of sequence² elements")


def vocabulary_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that have a row for each token."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    own = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
    return [name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in own]


def new_rows(
    recipe: Recipe, model: PreTrainedModel, deepspeed_config: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[tuple[int, int]]]:
    """Rows that are no base model's: of new tokens, and those that its files lack; by parameter, (first element, last
    + 1) of runs of them, flattened. `model` may be on the meta device."""
    if not recipe.model.grows:
        return {}
    stored = weights_of(recipe, model, deepspeed_config).stored
    ids = tokenizer.convert_tokens_to_ids(list(recipe.model.new_tokens))
    found = {}
    for name in vocabulary_parameters(model):
        rows, *inner = model.get_parameter(name).shape
        width, runs = math.prod(inner), list[tuple[int, int]]()
        for row in sorted({*ids, *range(stored[name].shape[0], rows)}):
            start = runs.pop()[0] if runs and runs[-1][1] == row * width else row * width
            runs.append((start, (row + 1) * width))
        found[name] = runs
    return found


def weights_of(recipe: Recipe, meta: PreTrainedModel, deepspeed_config: dict[str, Any]) -> Weights:
    """Where the weights of a model are, why transformers has to load them if it has, and what of them does not fit.

    Nothing of a hub name of which no weights are downloaded: `load` looks again.
    """
    folder = files(recipe.model)
    if not Path(recipe.model.path).is_dir() and not list(folder.glob("*.safetensors")):
        return Weights({}, reason="the hub's folder has no safetensors")
    found = locate(folder, meta, vocabulary_parameters(meta) if recipe.model.grows else [])
    found = replace(found, reason=found.reason or why_not_by_shards(deepspeed_config))
    if recipe.model.grows and found.reason and not found.problems:
        found.problems.append(_cannot_grow(recipe.model, found.reason))
    return found


def _cannot_grow(model: Model, reason: str) -> str:
    return (
        f"model.{'new_tokens' if model.new_tokens else 'vocabulary_multiple'}: {reason}, so the vocabulary cannot be "
        "grown here; grow it with transformers' resize_token_embeddings and save the model"
    )


def facts(model: PreTrainedModel) -> Facts:
    """Sizes of a model; shapes are enough."""
    sizes = [math.prod(parameter.shape) for parameter in model.parameters()]
    config = model.config.get_text_config()
    layers: dict[int, int] = {}
    for name, layer in layer_of(model).items():
        layers[layer] = layers.get(layer, 0) + model.get_parameter(name).numel()
    of_vocabulary = {name: model.get_parameter(name) for name in vocabulary_parameters(model)}
    return Facts(
        architecture=type(model).__name__, parameters=sum(sizes), largest_parameter=max(sizes),
        hidden_size=int(config.hidden_size), vocabulary_size=int(config.vocab_size),
        layers=int(config.num_hidden_layers),
        # Where the layers are not found: as if they were all of the model.
        largest_layer=max(layers.values(), default=sum(sizes) // max(1, int(config.num_hidden_layers))),
        vocabulary_parameters=sum(one.numel() for one in {id(one): one for one in of_vocabulary.values()}.values()),
        largest_vector=max((one.numel() for one in model.parameters() if one.ndim < 2), default=0),
        smallest_matrix=min(one.numel() for one in model.parameters() if one.ndim > 1), sizes=tuple(sizes),
    )  # fmt: skip


def load(
    recipe: Recipe,
    deepspeed_config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    read: bool = True,
    attention: Attention | None = None,
) -> PreTrainedModel:
    """The base model in ZeRO-3 shards, each read from the files by the rank that owns it. All ranks together.

    Where that cannot be, transformers loads: layer by layer, read by rank 0 and scattered. Every parameter is
    trainable.

    Args:
        read: False leaves the weights zero where it can, for a checkpoint that will fill them.
        attention: as of `attention_of`, which must not be asked again where `kernels.apply` has changed the modules.

    Raises:
        BadInput: the weights do not fit the config.
    """
    started, dtype = time.perf_counter(), precision(recipe)
    unset_hf_deepspeed_config()  # of a model that was loaded before: this one would be built whole, then cut
    attention = attention or attention_of(recipe.model)
    folder = files(recipe.model, weights=True)
    with _parameters_on_meta():
        model = _from_config(recipe.model, tokenizer, attention.name, dtype)
    weights = weights_of(recipe, model, deepspeed_config)
    if weights.problems or (weights.reason and recipe.model.grows):
        raise BadInput(weights.problems or [_cannot_grow(recipe.model, weights.reason)])
    if weights.reason:
        model = _load_by_transformers(recipe, folder, deepspeed_config, attention.name)
        said = f"by transformers, since {weights.reason}"
    else:
        make_empty_shards(model, deepspeed_config, dtype)
        count = _place_buffers(model, weights)
        count += _read_shards(recipe.model, model, weights, tokenizer) if read else 0
        said = f"{count / 1e9:.2f} GB read by each rank" if read else "not read yet"
    kernel = use_best_kernel(attention.layers, dtype) if attention.name == VARLEN else ""
    if dist.get_rank() == 0:
        print(f"weights: {said} ({time.perf_counter() - started:.1f} s)", flush=True)
        print(f"attention: {kernel}\n" if kernel else "", end="", flush=True)
    return _ready(model, deepspeed_config, dtype)


def _ready(model: PreTrainedModel, deepspeed_config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    # generate() asks it whether ranks must keep step; transformers holds a weak reference, so we keep a strong one.
    model.fullft_deepspeed_handle = HfDeepSpeedConfig(deepspeed_config)
    model.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if parameter.ds_tensor.dtype != dtype:
            raise RuntimeError(f"{name} was loaded as {parameter.ds_tensor.dtype}, not {dtype}")
    model.train()
    return model


@torch.no_grad()
def without_weights(
    recipe: Recipe, deepspeed_config: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, attention: Attention
) -> PreTrainedModel:
    """The model as `load` leaves it, but that nothing is read: this rank's shards are filled with random numbers.

    Where shards cannot be made empty (`shards.why_not_by_shards`), DeepSpeed makes each parameter whole and cuts it.
    """
    dtype = precision(recipe)
    unset_hf_deepspeed_config()
    if why_not_by_shards(deepspeed_config):
        import deepspeed

        # No dtype: on a CPU, zero.Init takes any for bf16.
        with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=deepspeed_config):
            model = _from_config(recipe.model, tokenizer, attention.name, dtype)
    else:
        with _parameters_on_meta():
            model = _from_config(recipe.model, tokenizer, attention.name, dtype)
        make_empty_shards(model, deepspeed_config, dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device()).contiguous()
    for parameter in model.parameters():
        for shard in (parameter.ds_tensor, getattr(parameter, "ds_secondary_tensor", None)):
            if shard is not None:
                shard.normal_(0, 0.02) if parameter.ds_shape[1:] else shard.fill_(1)
    if attention.name == VARLEN:
        use_best_kernel(attention.layers, dtype)
    return _ready(model, deepspeed_config, dtype)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made in here have no storage; buffers, such as rotary frequencies, are computed as always."""
    register = torch.nn.Module.register_parameter

    def without_storage(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = without_storage  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


@torch.no_grad()
def _place_buffers(built: PreTrainedModel, weights: Weights) -> int:
    """Bring buffers to the device, persistent ones from the files, as checkpoints hold none; returns the bytes read."""
    persistent, parts = set(built.state_dict()), []
    for module_name, module in built.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            module._buffers[name] = placed = buffer.to(device()).contiguous()
            if (full := f"{module_name}.{name}".lstrip(".")) in persistent:
                parts.append(Part(weights.stored[full], 0, placed.view(-1)))
    return read_parts(parts)


@torch.no_grad()
def _read_shards(model: Model, built: PreTrainedModel, weights: Weights, tokenizer: PreTrainedTokenizerBase) -> int:
    """Fill this rank's shards from the files; returns the bytes read."""
    names, parts = {parameter: name for name, parameter in built.named_parameters()}, []
    for parameter, name in names.items():
        stored = weights.stored[name]
        parts.append(Part(stored, *own_part(parameter, stored.numel)))
    count = read_parts(parts)
    new_ids = tokenizer.convert_tokens_to_ids(list(model.new_tokens))
    for parameter in dict.fromkeys(map(built.get_parameter, vocabulary_parameters(built))):
        _fill_new_rows(parameter, weights.stored[names[parameter]], new_ids)
    return count


def _fill_new_rows(parameter: Any, stored: Stored, new_ids: list[int]) -> None:
    """New tokens, and rows that the files lack, start as the mean of the files' rows. All ranks together."""
    rows = sorted({*new_ids, *range(stored.shape[0], parameter.ds_shape[0])})
    if not rows:
        return
    shares = mean_row(stored, dist.get_rank(), dist.get_world_size()).to(device())
    dist.all_reduce(shares)
    mean = shares.sum(0).to(parameter.ds_tensor.dtype)
    start, shard = own_part(parameter)
    for row in rows:
        first, last = (min(max(row * len(mean) + edge - start, 0), len(shard)) for edge in (0, len(mean)))
        shard[first:last] = mean[first + start - row * len(mean) : last + start - row * len(mean)]


def _load_by_transformers(
    recipe: Recipe, folder: Path, deepspeed_config: dict[str, Any], attention: str
) -> PreTrainedModel:
    # from_pretrained builds under zero.Init if this object exists.
    handle = HfDeepSpeedConfig(deepspeed_config)
    path = folder if list(folder.glob("*.safetensors")) else recipe.model.path
    model, report = AutoModelForCausalLM.from_pretrained(
        path, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code,
        attn_implementation=attention, dtype=precision(recipe), output_loading_info=True,
    )  # fmt: skip
    model.fullft_deepspeed_handle = handle
    if bad := sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]:
        raise BadInput(f"model.path: weights of {recipe.model.path} do not fit its config: {'; '.join(bad[:_SHOWN])}")
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def require_documents_apart(engine: Any, micro_batch_size: int, sequence_parallel: int = 1) -> None:
    """Run two packed documents, change the first, and see that the logits of the second stay. All ranks together.

    In a micro-batch of the real size, told its documents as in training, by the ranks that share one.

    Attention that ignores the document borders would train on contaminated context without a word.

    Raises:
        BadInput: they do not stay.
    """
    engine.eval()
    half, part = 4 * sequence_parallel, dist.get_rank() % sequence_parallel
    columns = slice(part * 8, part * 8 + 8)
    rows = torch.tensor([[*range(half)] * 2] * micro_batch_size)
    documents = replace(Documents.of(rows), ranks=sequence_parallel).to(engine.device)
    in_second = torch.arange(2 * half)[columns] >= half
    logits = []
    for turned in (0, 1):
        first = [5 + (at + turned) % 2 for at in range(half)]
        ids = torch.tensor([first + [1 + at % 4 for at in range(half)]] * micro_batch_size)
        ids, positions = (one[:, columns].to(engine.device) for one in (ids, rows))
        told = documents_arguments(engine, documents)
        output = engine(input_ids=ids, position_ids=positions, use_cache=False, **told).logits
        logits.append(output[:, in_second.to(engine.device)].float())
    engine.train()
    change = torch.zeros((), device=engine.device)
    if len(logits[0][0]):
        change = (logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp(min=1e-6)
    dist.all_reduce(change, dist.ReduceOp.MAX)
    round_off = 1e-3 if next(engine.module.parameters()).dtype == torch.float32 else 3e-2  # bf16 has 8 bits
    if float(change) > round_off:
        name = engine.module.config._attn_implementation
        raise BadInput(
            f"model.attention: with {name}, {type(engine.module).__name__} lets packed documents see each other "
            f"(logits change by {float(change):.1%}); choose another attention, or data.packing=false"
        )
