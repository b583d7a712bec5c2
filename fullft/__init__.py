"""Full-parameter fine-tuning of large language models under DeepSpeed ZeRO-3, with forgetting measured."""

__version__ = "0.1.0"
