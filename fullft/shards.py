"""How ZeRO-3 cuts a parameter, known here and nowhere else.

Rank r of W holds the elements [r·c, (r+1)·c) of the flattened parameter, c = ceil(numel / W); the last shards are
padded to c. That is also how `DTensor` shards dimension 0, so a shard without its padding is the local part of a 1-D
DTensor, which PyTorch's distributed checkpoints save from one world size and load into another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

STATES = ("weight", "exp_avg", "exp_avg_sq")
AVERAGE = "ema"  # the moving average of the weights, a fourth state where a run keeps it


def why_not_by_shards(config: dict[str, Any]) -> str:
    """Why shards cannot be made empty and filled from files under a DeepSpeed configuration; empty if they can."""
    zero = config["zero_optimization"]
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        return "offload_param is nvme"
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key):
            return f"{key} is set"
    return "" if (zero.get("zero_hpz_partition_size") or 1) == 1 else "zero_hpz_partition_size is set"


def make_empty_shards(model: torch.nn.Module, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Turn a model on the meta device into one of ZeRO-3 parameters, whose shards are zeros; buffers are left.

    `zero.Init` would make each parameter whole, broadcast it and cut it. Here none is ever whole: a parameter has the
    memory of one element while DeepSpeed notes its shape.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    class EmptyShards(deepspeed.zero.Init):  # type: ignore[misc]
        def _zero_init_param(self, parameter: Any) -> None:
            self._convert_to_deepspeed_param(parameter)
            width = self._aligned_size(parameter) // self._partition_world_size(parameter)
            device = self.local_device if parameter.ds_persist else self.remote_device
            shard: Any = torch.zeros(width, dtype=parameter.dtype, device=device)
            if self.pin_memory and shard.device.type == "cpu":
                shard = get_accelerator().pin_memory(shard)
            shard.ds_numel, shard.status, shard.final_location = width, PartitionedParamStatus.AVAILABLE, None
            parameter.ds_tensor, parameter.ds_numel_aligned = shard, self._aligned_size(parameter)
            parameter.partition()

    device = get_accelerator().current_device_name()
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # a tied parameter stays one
    for module in model.modules():
        for name, meta in module._parameters.items():
            if meta is not None and meta not in made:
                made[meta] = torch.nn.Parameter(torch.zeros(1, dtype=meta.dtype, device=device).expand(meta.shape))
            if meta is not None:
                module._parameters[name] = made[meta]
    EmptyShards(module=model, config_dict_or_path=config, dtype=dtype)


def own_part(parameter: Any, limit: int | None = None) -> tuple[int, torch.Tensor]:
    """(first element, shard [n]) of this rank, n elements of the flattened parameter below `limit` (default: all)."""
    start = dist.get_rank() * parameter.ds_tensor.numel()
    end = min(start + parameter.ds_tensor.numel(), parameter.ds_numel if limit is None else limit)
    return start, parameter.ds_tensor[: max(0, end - start)]


def mesh_of_all_ranks(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (dist.get_world_size(),))


def local_part(parameter: Any) -> slice:
    """Elements of this rank's shard that are not padding."""
    width = parameter.ds_tensor.numel()
    return slice(0, max(0, min(width, parameter.ds_numel - dist.get_rank() * width)))


def has_average(engine: Any) -> bool:
    optimizer = engine.optimizer
    return any(AVERAGE in optimizer.optimizer.state[flat] for flat in optimizer.fp32_partitioned_groups_flat)


def states_of(engine: Any) -> tuple[str, ...]:
    """The names of what the optimizer has of each parameter."""
    return (*STATES, AVERAGE) if has_average(engine) else STATES


def optimizer_shards(engine: Any) -> Iterator[tuple[str, Any, dict[str, torch.Tensor]]]:
    """(name, parameter, {state: shard [c] fp32}) of every parameter, where the optimizer has it: on the host if it is
    offloaded there. A view, or a copy if it is on NVMe."""
    states = states_of(engine)
    for name, parameter in engine.module.named_parameters():
        yield name, parameter, {state: _shard(engine, parameter, state) for state in states}


def place_in_flat(engine: Any, parameter: Any) -> tuple[torch.Tensor, int]:
    """The flat group of fp32 weights that has this rank's shard of a parameter, and where in it that begins."""
    shard = _shard(engine, parameter, "weight")
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        at = (shard.data_ptr() - flat.data_ptr()) // flat.element_size()
        if flat.device == shard.device and 0 <= at < len(flat):
            return flat, at
    raise RuntimeError("a parameter's shard is in none of the optimizer's groups")


def _shard(engine: Any, parameter: Any, state: str) -> torch.Tensor:
    # Not safe_get_local_fp32_param: it brings shards of an offloaded optimizer to the GPU, which may not hold them all.
    shard: torch.Tensor
    shard, _ = engine.optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=True, optim_state_key=None if state == "weight" else state
    )
    return shard.clone() if engine.optimizer.swap_optimizer else shard


def _result(engine: Any) -> str:
    """The state that a run is to leave behind: the average if there is one."""
    return AVERAGE if has_average(engine) else "weight"


def master_shards(engine: Any) -> Iterator[tuple[str, int, torch.Tensor]]:
    """(name, first element, this rank's fp32 weights [<= c] without padding) of every parameter, one by one; their
    average if there is one."""
    state = _result(engine)
    for name, parameter in engine.module.named_parameters():
        shard = _shard(engine, parameter, state)
        yield name, dist.get_rank() * len(shard), shard[local_part(parameter)]


def gathered_weights(engine: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(name, flattened weights [numel] of `dtype`) of every parameter, on rank 0's CPU; else None. All ranks together.

    One parameter at a time, and only rank 0 has all of it. Their average if there is one.
    """
    state = _result(engine)
    for name, parameter in engine.module.named_parameters():
        shard = _shard(engine, parameter, state).to(parameter.device, dtype)
        whole = None
        if dist.get_rank() == 0:
            whole = torch.empty(dist.get_world_size() * len(shard), dtype=dtype, device=shard.device)
        dist.gather(shard, list(whole.chunk(dist.get_world_size())) if whole is not None else None, dst=0)
        yield name, whole[: parameter.ds_numel].cpu() if whole is not None else None


def set_optimizer_shards(parameter: Any, shards: dict[str, torch.Tensor]) -> None:
    """Write shards, as `optimizer_shards` gives them, back into the optimizer."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    safe_set_local_fp32_param(parameter, shards["weight"])
    for state, shard in shards.items():
        if state != "weight":
            safe_set_local_optimizer_state(parameter, shard, state)


def to_dtensor(shard: torch.Tensor, parameter: Any, mesh: DeviceMesh) -> DTensor:
    """A shard [c] as the local part of a DTensor [numel] over the mesh; shares the shard's memory."""
    return DTensor.from_local(
        shard[local_part(parameter)],
        mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size([parameter.ds_numel]),
        stride=(1,),
    )


def allocate_optimizer_states(engine: Any) -> None:
    """Make AdamW's moments, which torch makes only in its first step, so that a checkpoint can be read into them."""
    optimizer = engine.optimizer
    for flat in optimizer.fp32_partitioned_groups_flat:
        state = optimizer.optimizer.state[flat]
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)


def set_optimizer_step(engine: Any, step: int) -> None:
    """The step count of AdamW's bias correction, one tensor per flat group: shared, it would advance once per group."""
    optimizer = engine.optimizer
    for flat in optimizer.fp32_partitioned_groups_flat:
        fused = any(group.get("fused") for group in optimizer.optimizer.param_groups)
        count = torch.tensor(float(step), device=flat.device if fused else "cpu")
        is_torch = (
            isinstance(optimizer.optimizer, torch.optim.Optimizer)
            and "DeepSpeed" not in type(optimizer.optimizer).__name__
        )
        optimizer.optimizer.state[flat]["step"] = count if is_torch else step


def start_optimizer(engine: Any) -> None:
    """The optimizer's state as it is before the first step, which is else made in it."""
    allocate_optimizer_states(engine)
    set_optimizer_step(engine, 0)  # AdamW makes a state only where there is none


@torch.no_grad()
def refresh_model_from_optimizer(engine: Any, state: str = "weight") -> None:
    """Copy the fp32 shards, which have changed, to those that forward uses, and gather resident parameters anew.

    All ranks together. `state`: or those of the average.
    """
    for _, parameter in engine.module.named_parameters():
        parameter.ds_tensor.copy_(_shard(engine, parameter, state))
    engine.optimizer.invalidate_secondary_tensor()  # hpZ would go on gathering its copy of the weights of before
    gather_resident(engine)


@torch.no_grad()
def gather_resident(engine: Any) -> None:
    """After the shards have changed: small parameters, which every rank keeps whole, anew. All ranks together."""
    if resident := engine.optimizer.persistent_parameters:
        resident[0].partition(resident)
        resident[0].all_gather(resident)
