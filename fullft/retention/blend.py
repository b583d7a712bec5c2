"""Weights between the base model and the tuned one: w = base + α · (tuned - base).

WiSE-FT (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903): α = 0 is the base model, α = 1 the tuned one, and a
model in between may keep most of the skill and forget less. It costs no training. Layers may have a share of α of their
own: near the input, where what is general lies, less (LiNeS, Wang et al. 2024, https://arxiv.org/abs/2410.17146).

The arithmetic is fp32, rounded once to the dtype of the tuned model; where α is 0 or 1 the bits are those of the base
or the tuned model. Both are read, and the blend is written, in pieces: whatever the size of
the model, some pieces are in memory. `blend_folders` makes a Hugging Face folder; `set_weights` blends into the ZeRO-3
shards of a live engine, each rank the elements it owns.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from transformers import AutoConfig, PreTrainedModel

from fullft import __version__
from fullft.checkpoint import to_disk
from fullft.errors import BadInput
from fullft.model import on_meta, vocabulary_parameters
from fullft.recipe import Model
from fullft.shards import gather_resident, own_part
from fullft.tokenizer import files, first_line
from fullft.weights import (
    DTYPES,
    NewFile,
    Part,
    Stored,
    create,
    is_ignored,
    locate,
    mean_row,
    read_parts,
    renamer,
    stored_tensors,
    tensors_of,
    tied,
    write_parts,
)

T = TypeVar("T")
_PIECE = 1 << 20  # elements blended at once
_SHOWN = 20
_INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")  # the first number in a tensor's name
# What changes the meaning of weights of the same shapes.
_OF_ARCHITECTURE = (
    "model_type", "hidden_act", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters",
    "num_experts_per_tok",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A tensor as the two models have it."""

    base: Stored
    tuned: Stored
    scale: float = 1.0  # its share of α
    mean: torch.Tensor | None = None  # [elements of a row] fp32, in place of rows that the base lacks

    def piece(self, alpha: float, start: int, count: int) -> torch.Tensor:
        """Elements [start, start + count) of the blend: [count], fp32, or in a model's own dtype if they are its own.

        Numbers that are no floats (positions, masks) are the tuned model's.
        """
        own, share = DTYPES[self.tuned.dtype], alpha * self.scale
        if share == 1 or not own.is_floating_point:
            return self._read(self.tuned, start, count, own)
        whole = start + count <= self.base.numel
        if share == 0 and whole:
            return self._read(self.base, start, count, DTYPES[self.base.dtype])
        fine = torch.promote_types(torch.float32, torch.promote_types(own, DTYPES[self.base.dtype]))
        base = self._read(self.base, start, count, fine)
        return base if share == 0 else base.lerp_(self._read(self.tuned, start, count, fine), share)

    def _read(self, stored: Stored, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        values = torch.empty(count, dtype=dtype)
        inside = max(0, min(count, stored.numel - start))
        read_parts([Part(stored, start, values[:inside])])
        if inside < count:
            assert self.mean is not None
            values[inside:] = self.mean[torch.arange(start + inside, start + count) % len(self.mean)].to(dtype)
        return values


# Which tensors belong together


def pairs_of_files(base: Path, tuned: Path, trust_remote_code: bool = False) -> dict[str, Pair]:
    """{name in the tuned model's files: its pair}.

    The files may name, or tie, their tensors differently, as transformers would load them into one and the same model.
    Rows of the vocabulary that only the tuned model has are those of new tokens: the base's mean row stands for them,
    as it was before training.

    Raises:
        BadInput: the two are not the same architecture, or a file is damaged; all that differs is named.
    """
    problems = _config_problems(base, tuned, trust_remote_code)
    theirs, ours = _stored(base), _stored(tuned)
    if problems:
        raise BadInput(problems)
    grown: set[str] = set()
    if {name: one.shape for name, one in theirs.items()} != {name: one.shape for name, one in ours.items()}:
        theirs, grown, problems = _by_our_names(base, theirs, tuned, ours, trust_remote_code)
    pairs = {name: Pair(theirs[name], one) for name, one in ours.items() if name in theirs}
    problems += _pair_problems(pairs, grown)
    if problems:
        raise BadInput(problems)
    return {name: _with_mean(pair) for name, pair in pairs.items()}


def pairs_of_model(base: Path, tuned: Path, meta: PreTrainedModel, trust_remote_code: bool) -> dict[str, Pair]:
    """{parameter or persistent buffer of a model: its pair}.

    Raises:
        BadInput: the two do not fit the model, or their files hold other tensors than it has (experts fused on
            loading), so that shards cannot be read from them.
    """
    problems = _config_problems(base, tuned, trust_remote_code)
    grown = vocabulary_parameters(meta)
    found = [locate(base, meta, grown), locate(tuned, meta)]
    for folder, weights in zip((base, tuned), found, strict=True):
        problems += [problem.removeprefix("model.path: ") for problem in weights.problems]
        if weights.reason and not weights.problems:
            problems.append(
                f"{folder} cannot be blended shard by shard: {weights.reason}; make each blend with `fullft blend BASE "
                "TUNED OUT --alpha A`, and measure it with `fullft eval RECIPE --model OUT`"
            )
    if problems:
        raise BadInput(problems)
    pairs = {name: Pair(found[0].stored[name], found[1].stored[name]) for name in meta.state_dict()}
    return {name: _with_mean(pair) for name, pair in pairs.items()}


def _told(action: Callable[..., T], *arguments: Any) -> T:
    """The errors speak of a recipe's key, which is not what was given here."""
    try:
        return action(*arguments)
    except BadInput as error:
        raise BadInput([problem.removeprefix("model.path: ") for problem in error.problems]) from None


def folder_of(name: str, of_recipe: Model | None = None) -> Path:
    """The folder of a model: a folder, or a hub name, whose files are downloaded first; a recipe's knows the revision.

    Raises:
        BadInput: there is none.
    """
    chosen = of_recipe if of_recipe is not None and of_recipe.path == name else Model(path=name)  # type: ignore[call-arg]
    return _told(files, chosen, True)


def _stored(folder: Path) -> dict[str, Stored]:
    found = _told(stored_tensors, folder)
    if not found:
        raise BadInput(f"{folder} holds no weights (*.safetensors)")
    return found


def _config_problems(base: Path, tuned: Path, trust_remote_code: bool) -> list[str]:
    configs: list[dict[str, Any]] = []
    for folder in (base, tuned):
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            configs.append(config.get_text_config().to_dict())
        except Exception as error:  # transformers raises many kinds
            return [f"the config of {folder} cannot be read: {first_line(error)}"]
    one, other = configs
    both = [key for key in _OF_ARCHITECTURE if key in one and key in other]
    differ = [f"{key} {one[key]!r} and {other[key]!r}" for key in both if one[key] != other[key]]
    return [f"{base} and {tuned} are not the same architecture: {'; '.join(differ)}"] if differ else []


def _by_our_names(
    base: Path, theirs: dict[str, Stored], tuned: Path, ours: dict[str, Stored], trust_remote_code: bool
) -> tuple[dict[str, Stored], set[str], list[str]]:
    """({name in the tuned files: the base's tensor}, those with rows of the vocabulary, problems)."""
    metas = [
        _told(on_meta, Model(path=str(folder), trust_remote_code=trust_remote_code))  # type: ignore[call-arg]
        for folder in (base, tuned)
    ]
    base_name, our_name = _namer(metas[0]), _namer(metas[1])
    found = {base_name(name): stored for name, stored in theirs.items()}
    our_names = {name: our_name(name) for name in ours}
    used, problems = set(our_names.values()), list[str]()
    for group in tied(metas[0]):
        there = [name for name in group if name in found]
        if any(not _same(found[name], found[there[0]]) for name in there[1:]):
            problems.append(f"{base} has different tensors {' and '.join(there)}, which its config ties")
        elif there:
            found |= dict.fromkeys(group, found[there[0]])
            used |= set(group) if used & set(group) else set()
    for folder, what in (
        (base, sorted(used - found.keys())),
        (tuned, sorted(name for name in found.keys() - used if not is_ignored(name, metas[0]))),
    ):
        if what:
            more = f" and {len(what) - _SHOWN} more" if len(what) > _SHOWN else ""
            problems.append(f"{folder} lacks tensors of the other model: {'; '.join(what[:_SHOWN])}{more}")
    vocabulary = set(vocabulary_parameters(metas[1]))
    grown = {name for name, model_name in our_names.items() if model_name in vocabulary}
    return {name: found[one] for name, one in our_names.items() if one in found}, grown, problems


def _namer(meta: PreTrainedModel) -> Callable[[str], str]:
    """Name in a file → the model's own; of a tensor that transformers converts on loading, that in the file."""
    rename = renamer(meta)

    def own(name: str) -> str:
        ours, converted = rename(name)
        return name if converted is not None else ours

    return own


def _same(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same values."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pair = Pair(one, other)
    pieces = ((start, min(_PIECE, one.numel - start)) for start in range(0, one.numel, _PIECE))
    return all(torch.equal(pair.piece(0, *piece), pair.piece(1, *piece)) for piece in pieces)


def _pair_problems(pairs: dict[str, Pair], grown: set[str]) -> list[str]:
    problems = []
    for name, pair in pairs.items():
        one, other = pair.base.shape, pair.tuned.shape
        if one != other and not (name in grown and one[1:] == other[1:] and one[0] < other[0]):
            problems.append(f"{name} is {list(one)} in the base, {list(other)} in the tuned model")
        elif unknown := sorted({pair.base.dtype, pair.tuned.dtype} - DTYPES.keys()):
            problems.append(f"{name} is stored as {', '.join(unknown)}: quantized weights cannot be blended")
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"and {len(problems) - _SHOWN} tensors more"]
    return problems


def _with_mean(pair: Pair) -> Pair:
    """Where the base lacks rows, with the mean of those it has."""
    if pair.base.shape == pair.tuned.shape:
        return pair
    return Pair(pair.base, pair.tuned, pair.scale, mean_row(pair.base, 0, 1).sum(0).float())


# Shares of α


def with_scales(pairs: dict[str, Pair], words: Sequence[str]) -> dict[str, Pair]:
    """The pairs with the shares of α that were given: WHICH=SHARE, later words over earlier ones.

        7=0.5          layer 7 (the first number in a tensor's name)
        0-7=0.3        layers 0 to 7
        0-=0.2..1      from the first layer to the last, linearly from 0.2 to 1
        *embed*=0      tensors by name, with * ? [...]

    Raises:
        BadInput: a word that is none of these, or matches no tensor.
    """
    layers = {name: int(found[1]) for name in pairs if (found := _LAYER.search(name))}
    scales, problems = dict.fromkeys(pairs, 1.0), []
    for word in words:
        which, _, value = word.rpartition("=")
        first, last = _number(value.partition("..")[0]), _number(value.partition("..")[2] or value)
        numbered = re.fullmatch(r"(\d+)(-\d*)?", which)
        if not which or not 0 <= first <= 1 or not 0 <= last <= 1 or (first != last and not numbered):
            problems.append(f"--layer-scale: {word!r} is not WHICH=SHARE, such as 0-7=0.3, 0-=0.2..1 or '*embed*=0'")
            continue
        if numbered:
            low, end = int(numbered[1]), (numbered[2] or "-" + numbered[1])[1:]
            high = int(end) if end else max(layers.values(), default=0)
            slope = (last - first) / max(1, high - low)
            hit = {name: first + slope * (layer - low) for name, layer in layers.items() if low <= layer <= high}
        else:
            hit = {name: first for name in pairs if fnmatchcase(name, which)}
        if not hit:
            problems.append(f"--layer-scale: {which} matches no tensor; names are like {', '.join(list(pairs)[:3])}")
        scales |= hit
    if problems:
        raise BadInput(problems)
    return {name: Pair(pair.base, pair.tuned, scales[name], pair.mean) for name, pair in pairs.items()}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# To a folder


def blend_folders(
    base: str, tuned: str, out: Path, alpha: float, scales: Sequence[str] = (), of_recipe: Model | None = None
) -> int:
    """Write the blend of two models (folders or hub names) to the new folder `out`; returns the bytes of its weights.

    Its files, their tensors and dtypes, config and tokenizer are those of the tuned model.

    Raises:
        BadInput: the two do not belong together, or `out` exists, cannot be made, or has no room.
    """
    if not 0 <= alpha <= 1:
        raise BadInput(f"--alpha: {alpha:g} is not between 0 (the base model) and 1 (the tuned model)")
    partial = out.with_name(out.name + ".tmp")
    for there, advice in ((out, "give another folder"), (partial, "left by a blend that was killed? Delete it")):
        if there.exists():
            raise BadInput(f"{there} exists, nothing is overwritten; {advice}")
    folders = folder_of(base, of_recipe), folder_of(tuned)
    trusted = of_recipe is not None and of_recipe.trust_remote_code
    pairs = with_scales(pairs_of_files(*folders, trusted), scales)
    new_files = [_like(file, partial) for file in sorted({pair.tuned.file for pair in pairs.values()})]
    try:
        try:
            partial.mkdir(parents=True)
            _copy_all_but_weights(folders[1], partial, index=len(new_files) > 1)
            (partial / "README.md").write_text(_card(base, tuned, out.name, alpha, scales))
            for file in new_files:
                create(file)
        except OSError as error:
            raise BadInput(f"{out} cannot be written: {error}") from None
        targets = {name: stored for file in new_files for name, stored in file.stored.items()}
        write_parts((part for name, pair in pairs.items() for part in _parts(pair, targets[name], alpha)), ahead=1)
        to_disk(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return sum(file.size for file in new_files)


def _parts(pair: Pair, target: Stored, alpha: float) -> Iterator[Part]:
    for start in range(0, target.numel, _PIECE):
        yield Part(target, start, pair.piece(alpha, start, min(_PIECE, target.numel - start)))


def _like(file: Path, folder: Path) -> NewFile:
    """A file with the header of another, so with the same tensors at the same places."""
    with file.open("rb") as content:
        length = content.read(8)
        header = length + content.read(int.from_bytes(length, "little"))
    path = folder / file.name
    tensors = {name: Stored(path, one.dtype, one.shape, one.offset) for name, one in tensors_of(file).items()}
    return NewFile(path, header, tensors, file.stat().st_size)


def _copy_all_but_weights(tuned: Path, out: Path, index: bool) -> None:
    """Config, tokenizer, chat templates, the model's own code."""
    for path in tuned.iterdir():
        if path.name == "additional_chat_templates":
            shutil.copytree(path, out / path.name)
        elif path.suffix in (".json", ".jinja", ".model", ".txt", ".py") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    if index and (tuned / _INDEX).exists():
        shutil.copyfile(tuned / _INDEX, out / _INDEX)


def _card(base: str, tuned: str, name: str, alpha: float, scales: Sequence[str]) -> str:
    """README.md: what was blended, and how."""
    about: dict[str, Any] = {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["fullft", "merge"]
    }  # fmt: skip
    if on_hub := [one for one in (base, tuned) if not Path(one).exists()]:
        about |= {"base_model": on_hub, "base_model_relation": "merge"}
    lines = [
        "---", yaml.safe_dump(about, sort_keys=False) + "---", "", f"# {name}", "",
        f"`{base}` + {alpha:g} × (`{tuned}` − `{base}`), tensor by tensor "
        f"([WiSE-FT](https://arxiv.org/abs/2109.01903)), made with fullft {__version__}.",
    ]  # fmt: skip
    if scales:
        lines += ["", "Shares of α = " + f"{alpha:g}: " + ", ".join(f"`{word}`" for word in scales) + "."]
    return "\n".join(lines) + "\n"


# Into a live engine


@torch.no_grad()
def set_weights(engine: Any, pairs: dict[str, Pair], alpha: float) -> None:
    """Make the engine's model the blend. Each rank reads its own elements of both from the files. All ranks together.

    Needs memory for some pieces, beside the shards. Only for an engine without optimizer, whose fp32 weights would
    not follow.
    """
    own = [(name, *own_part(parameter)) for name, parameter in engine.module.named_parameters()]
    own += [(name, 0, buffer.view(-1)) for name, buffer in engine.module.named_buffers() if name in pairs]
    for name, first, values in own:
        for start in range(0, len(values), _PIECE):
            piece = values[start : start + _PIECE]
            piece.copy_(pairs[name].piece(alpha, first + start, len(piece)))
    gather_resident(engine)
