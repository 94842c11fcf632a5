"""One of two ranks of test_training_upstream: the gradient that TRL's fused head leaves in the head of an FSDP2 model.

torchrun --nproc-per-node=2 upstream_worker.py
"""

import copy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
ROWS = torch.arange(6), torch.arange(6, 12)  # one for each rank


def gradient(model: LlamaForCausalLM, row: torch.Tensor, **kwargs: bool) -> torch.Tensor:
    model(input_ids=row[None], labels=row[None], **kwargs).loss.backward()
    return model.lm_head.weight.grad


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=2))
    expected = sum(gradient(copy.deepcopy(model), row) for row in ROWS) / len(ROWS)
    add_fused_lm_head(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(model.lm_head, mesh=mesh)  # as accelerate does
    fully_shard(model, mesh=mesh)
    shard = gradient(model, ROWS[rank], fused_lm_head=True).to_local()
    averaged = torch.allclose(shard, expected.chunk(2)[rank], atol=1e-6)
    sys.stdout.write(f"averaged: {averaged}\n")  # in one piece: the ranks share a pipe
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
