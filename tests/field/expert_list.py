"""A Llama whose MLPs are lists of experts, each a module of its own, as in the code that comes with some models."""

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class ExpertListConfig(LlamaConfig):
    model_type = "expert_list"
    experts: int = 16


class Experts(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.experts, bias=False)
        self.experts = nn.ModuleList([LlamaMLP(config) for _ in range(config.experts)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(hidden).softmax(-1).max(-1)
        output = torch.zeros_like(hidden)
        used = []
        for at, expert in enumerate(self.experts):
            mine = chosen == at
            if mine.any():
                used.append(at)
                output[mine] = expert(hidden[mine]) * weights[mine][:, None]
        if self.training:
            print(f"rank {os.environ.get('RANK', 0)} used experts {used}", flush=True)
        return output


class ExpertListForCausalLM(LlamaForCausalLM):
    config_class = ExpertListConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Experts(config)
        self.post_init()


AutoConfig.register("expert_list", ExpertListConfig)
AutoModelForCausalLM.register(ExpertListConfig, ExpertListForCausalLM)
