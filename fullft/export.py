"""The tuned model as a Hugging Face folder: from the live engine, by all ranks at once, or from a checkpoint.

Which element of which parameter becomes which byte of which file is laid out first, from shapes alone, on every rank
the same, as transformers' `save_pretrained` would write it. Rank 0 makes the files at their full size; then every rank
writes the elements that it owns.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from huggingface_hub import HfApi, get_token, split_state_dict_into_shards_factory
from huggingface_hub.constants import is_offline_mode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from fullft import checkpoint, lease, model, watchdog
from fullft.cluster import is_shared
from fullft.errors import BadInput
from fullft.recipe import Recipe, load_recipe
from fullft.report.summary import model_card, summary_or_none
from fullft.shards import gathered_weights, master_shards
from fullft.tokenizer import files, load_tokenizer
from fullft.weights import NewFile, Part, Stored, create, new_file, stored_buffers, write_parts

T = TypeVar("T")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def rehearse(meta: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write all of an export but the weights, and read it back, so that nothing of it can fail after the training.

    Raises:
        BadInput: e.g. a generation config that transformers reads but refuses to write.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            _write_all_but_weights(meta, tokenizer, Path(folder), torch.float32)
            type(tokenizer).from_pretrained(folder)
        except Exception as error:  # whatever it is, the export would meet it too
            raise BadInput(f"model.path: the tuned model could not be exported: {error}") from None


def _write_all_but_weights(
    meta: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    meta.save_pretrained(folder, state_dict={})  # config, generation config, the model's own code; no weights, no file
    config = type(meta.config).from_pretrained(folder)
    config.dtype = dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# What goes where


@dataclass(frozen=True)
class Target:
    """A tensor of the export: so many elements of a parameter or buffer, from the element `start` of it."""

    stored: Stored
    start: int


@dataclass(frozen=True)
class Layout:
    """The files of the weights, and what of each parameter or buffer is written where."""

    files: list[NewFile]
    index: str  # model.safetensors.index.json; empty for a single file
    targets: dict[str, list[Target]]  # of each parameter (of tied names the first) and buffer
    computed: list[str]  # tensors that transformers makes from whole parameters; then `targets` is empty
    names: dict[str, str]  # the name in the model's state dict: that of the parameter or buffer in `targets`

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def parts(self, name: str, first: int, values: torch.Tensor) -> Iterator[Part]:
        """Where elements [first, first + len(values)) of a parameter or buffer are written."""
        for target in self.targets.get(name, ()):
            begin, end = max(first, target.start), min(first + len(values), target.start + target.stored.numel)
            if begin < end:
                yield Part(target.stored, begin - target.start, values[begin - first : end - first])


def lay_out(
    meta: PreTrainedModel, buffers: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype, max_shard_gb: float
) -> Layout:
    """As `save_pretrained` of a model with parameters of `dtype` would write it, tensor for tensor, file for file."""
    first_name: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in meta.named_parameters(remove_duplicate=False):
        names[name] = first_name.setdefault(id(parameter), name)
    state = {
        name: torch.empty(tensor.shape, dtype=dtype if name in names else buffers[name].dtype, device="meta")
        for name, tensor in meta.state_dict().items()
        if name not in (meta._keys_to_ignore_on_save or ())
    }
    state = remove_tied_weights_from_state_dict(state, meta)
    # The order in which transformers saves what it has loaded; it decides which tensor goes into which file.
    state = {name: state[name] for name in sorted(state, key=dot_natural_key)}
    names = {name: names.get(name, name) for name in state}
    saved = revert_weight_conversion(meta, dict(state))
    # By storage, since transformers leaves experts cut from one tensor together in a file.
    split = split_state_dict_into_shards_factory(
        saved, filename_pattern="model{suffix}.safetensors", max_shard_size=f"{int(max_shard_gb * 1000)}MB",
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
    )  # fmt: skip
    files = [
        new_file(folder / file, {name: saved[name] for name in inside})
        for file, inside in split.filename_to_tensors.items()
    ]
    index = ""
    if split.is_sharded:
        metadata = {"total_parameters": meta.num_parameters(), **split.metadata}
        content = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        index = json.dumps(content, indent=2, sort_keys=True) + "\n"
    ranges = _ranges(meta, state)
    computed = sorted(saved.keys() - ranges.keys())
    targets: dict[str, list[Target]] = {}
    for file in files if not computed else ():
        for name, stored in file.stored.items():
            source, start = ranges[name]
            targets.setdefault(names[source], []).append(Target(stored, start))
    return Layout(files, index, targets, computed, names)


class _Views(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies of meta tensors that were to make them contiguous stay views, so one sees what they were cut from."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return torch.ops.aten.alias.default(args[0])
        if func is torch.ops.aten._unsafe_view.default:  # of a copy in another order
            return torch.empty(args[1], dtype=args[0].dtype, device="meta")
        return func(*args, **(kwargs or {}))


def _ranges(meta: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, tuple[str, int]]:
    """{exported tensor: (the one of `state` that it is a range of, its first element)}, for those that are one.

    transformers saves some models as other tensors than it computes with: renamed, or fused experts one by one.
    """
    origin = {tensor.untyped_storage()._cdata: name for name, tensor in state.items()}
    try:
        with _Views():  # type: ignore[no-untyped-call]
            saved = revert_weight_conversion(meta, dict(state))
    except RuntimeError:  # something needed a copy
        saved = revert_weight_conversion(meta, dict(state))
    return {
        name: (origin[storage], int(tensor.storage_offset()))
        for name, tensor in saved.items()
        if (storage := tensor.untyped_storage()._cdata) in origin and tensor.is_contiguous()
    }


# From the live engine


def export(
    engine: Any, meta: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, dtype_name: str, card: str
) -> None:
    """Write the model to `export` in the run folder, atomically. All ranks together.

    No rank holds more of it than its shards. Only rank 0's folder is written to where the run folder is not the same
    for all ranks: then it gets one parameter at a time from the others.

    Args:
        meta: the model on the meta device; its config and generation config are written.
        dtype_name: bf16, fp16 or fp32.
        card: README.md, needed on rank 0 only.

    Raises:
        OSError: the disk is full.
    """
    folder, is_main, started = recipe.run_folder / "export", dist.get_rank() == 0, time.perf_counter()
    named = [str(lease.partial(folder))]  # rank 0 holds the lease that is in the name
    dist.broadcast_object_list(named, src=0)
    partial, dtype = Path(named[0]), DTYPES[dtype_name]
    buffers = _buffers(recipe, meta, dict(engine.module.named_buffers()))
    layout = lay_out(meta, buffers, partial, dtype, recipe.export.max_shard_gb)
    if is_main:
        _prepare(layout, meta, tokenizer, partial, dtype, card, f"fullft export {recipe.run_dir} OUT")
        _write(layout, buffers.items())
    if layout.computed:
        how = f"gathered by rank 0, since transformers computes {layout.computed[0]} and others on saving"
        whole = {name: full for name, full in _watched(gathered_weights(engine, dtype)) if full is not None}
        if is_main:
            _write_computed(layout, meta, whole | buffers)
    elif is_shared(recipe.run_folder):
        how = "written by all ranks"
        write_parts(
            part for name, first, shard in _watched(master_shards(engine)) for part in layout.parts(name, first, shard)
        )
    else:
        how = "written by rank 0, since not all ranks see its run folder"
        _write(layout, ((name, full) for name, full in _watched(gathered_weights(engine, dtype)) if full is not None))
    dist.barrier()  # every rank's bytes are on disk
    if is_main:
        checkpoint.to_disk(partial)
        lease.commit(folder)
        seconds = time.perf_counter() - started
        print(f"export: {layout.size / 1e9:.2f} GB {how} ({seconds:.1f} s): {folder.absolute()}", flush=True)
    dist.barrier()


def _watched(items: Iterable[T]) -> Iterator[T]:
    """A long export is no hang."""
    for item in items:
        watchdog.touch()
        yield item


def _buffers(recipe: Recipe, meta: PreTrainedModel, live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Persistent buffers, on the CPU: those of the base model, for they are not trained; else those of `live`."""
    wanted = set(meta.state_dict()) - {name for name, _ in meta.named_parameters(remove_duplicate=False)}
    found = stored_buffers(files(recipe.model, weights=True), meta) if wanted else {}
    found |= {name: live[name].cpu() for name in wanted - found.keys() if name in live}
    if missing := wanted - found.keys():
        raise BadInput(f"model.path: {recipe.model.path} has no safetensors with {', '.join(sorted(missing))}")
    return found


def _prepare(
    layout: Layout, meta: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, partial: Path, dtype: torch.dtype,
    card: str, again: str,
) -> None:  # fmt: skip
    """Everything but the weights, for which there is room then."""
    partial.mkdir(parents=True)
    try:
        _write_all_but_weights(meta, tokenizer, partial, dtype)
        (partial / "README.md").write_text(card)
        if layout.index:
            (partial / "model.safetensors.index.json").write_text(layout.index)
        for file in layout.files:
            create(file)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"the export of {layout.size / 1e9:.2f} GB cannot be written to {partial.parent.absolute()} ({error}). "
            f"Nothing is lost: make room, then start the run again, or `{again}` exports the last checkpoint"
        ) from None


def _write(layout: Layout, values: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write whole parameters or buffers, with few in memory at a time if `values` is a generator."""
    write_parts((part for name, whole in values for part in layout.parts(name, 0, whole.reshape(-1))), ahead=1)


def _write_computed(layout: Layout, meta: PreTrainedModel, values: dict[str, torch.Tensor]) -> None:
    """Let transformers convert the whole model, given flattened and by the names of `layout.targets`."""
    shapes = {name: tensor.shape for name, tensor in meta.state_dict().items()}
    state = {name: values[source].reshape(shapes[name]) for name, source in layout.names.items()}
    converted = revert_weight_conversion(meta, state)
    stored = {name: where for file in layout.files for name, where in file.stored.items()}
    write_parts(Part(stored[name], 0, tensor.reshape(-1)) for name, tensor in converted.items())


# From a checkpoint


def export_checkpoint(
    run_folder: Path, out: Path, step: int | None = None, dtype: str | None = None
) -> tuple[Path, list[str]]:
    """Write the model of a checkpoint to the new folder `out`, on one machine without GPU.

    Host memory: two times the largest shard of a parameter in fp32, and some blocks. (Where transformers computes
    tensors on saving: the whole model in `dtype`, twice.)

    Returns:
        the checkpoint, and what newer ones were passed over, and why.

    Raises:
        BadInput: no run folder, no such checkpoint, `out` exists, or the base model does not fit.
    """
    if not (run_folder / "recipe.yaml").exists():
        raise BadInput(f"{run_folder} is not a run folder of fullft (it has no recipe.yaml)")
    partial = out.with_name(out.name + ".tmp")
    for there, advice in ((out, "give another folder"), (partial, "left by an export that was killed? Delete it")):
        if there.exists():
            raise BadInput(f"{there} exists, nothing is overwritten; {advice}")
    recipe = load_recipe(run_folder / "recipe.yaml")
    chosen = DTYPES[dtype or _dtype_of_run(recipe, run_folder)]
    folder, skipped = checkpoint.find(run_folder / "checkpoints", step)
    tokenizer = load_tokenizer(recipe.model)
    meta = model.on_meta(recipe.model, tokenizer)
    buffers = _buffers(recipe, meta, {})
    layout = lay_out(meta, buffers, partial, chosen, recipe.export.max_shard_gb)
    weights = checkpoint.SavedWeights(folder)
    ours = {name: math.prod(parameter.shape) for name, parameter in meta.named_parameters()}
    if differ := sorted(
        name for name in ours.keys() | weights.sizes.keys() if ours.get(name) != weights.sizes.get(name)
    ):
        raise BadInput(f"model.path: {recipe.model.path} is not the model of {folder}: {', '.join(differ[:5])} differ")
    card = model_card(recipe, summary_or_none(run_folder, int(folder.name.rpartition("-")[2])))
    try:
        _prepare(layout, meta, tokenizer, partial, chosen, card, f"fullft export {run_folder} OUT")
        _write(layout, buffers.items())
        if layout.computed:
            print(f"{layout.computed[0]} and others are computed by transformers, so the whole model is put in memory")
            whole = {name: torch.empty(size, dtype=chosen) for name, size in ours.items()}
            for name, first, values in weights.shards():
                whole[name][first : first + len(values)] = values
            _write_computed(layout, meta, whole | buffers)
        else:
            shards = weights.shards()
            write_parts((part for shard in shards for part in layout.parts(*shard)), ahead=0)
        checkpoint.to_disk(partial)
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, FileNotFoundError) and not folder.exists():
            raise BadInput(f"{folder} was removed meanwhile by the run, which goes on; start again") from None
        raise
    return folder, skipped


def _dtype_of_run(recipe: Recipe, run_folder: Path) -> str:
    """dtype of the run's own export; `auto` was decided where it trained."""
    if recipe.export.dtype != "auto":
        return recipe.export.dtype
    try:
        return str(json.loads((run_folder / "plan.json").read_text())["export_dtype"])
    except (OSError, ValueError, KeyError):
        raise BadInput(
            f"{run_folder} does not say in which dtype it trained; give --dtype bf16, fp16 or fp32"
        ) from None


# To the hub


def require_hub(repository: str) -> None:
    """Raises BadInput when an upload would fail for want of a token, or of a network."""
    advice = "export.push_to_hub=null leaves the export in its folder"
    if is_offline_mode():
        raise BadInput(f"export.push_to_hub: {repository} cannot be uploaded, HF_HUB_OFFLINE is set; {advice}")
    if get_token() is None:
        raise BadInput(
            f"export.push_to_hub: there is no token to upload {repository} with; run `hf auth login` or set HF_TOKEN, "
            f"on the machine of rank 0 too ({advice})"
        )


def push_to_hub(folder: Path, repository: str) -> bool:
    """Upload an export; says how it went, and if it failed how to repeat it. Never raises. By one process alone."""
    print(f"uploading {folder} to {repository}", flush=True)
    try:
        hub = HfApi(library_name="fullft")
        hub.create_repo(repository, exist_ok=True, private=True)  # nobody's model is published by a default
        commit = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by fullft")
    except Exception as error:  # no network, no permission, quota: the model is safe in its folder
        print(
            f"fullft: {folder} is complete but was not uploaded ({type(error).__name__}: {error}). To repeat it: "
            f"hf upload {repository} {folder}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return False
    print(f"uploaded: {commit.commit_url}", flush=True)
    return True
