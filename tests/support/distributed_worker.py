"""One rank of test_distributed: three steps, in each of which half of the ranks have no image.

torchrun --nproc-per-node=2 distributed_worker.py CHECKPOINT {ddp,fsdp2,none} OUTPUT.json
"""

import gc
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from modeling_llava_stf import LlavaSTFForConditionalGeneration  # noqa: E402

STEPS = 3


def batch(model: LlavaSTFForConditionalGeneration, index: int) -> dict[str, torch.Tensor]:
    """Batch `index`: an image in the even ones, text of the same number of targets in the odd ones."""
    generator = torch.Generator().manual_seed(index)
    config = model.config
    text = torch.randint(3, 400, (1, 12), generator=generator)
    if index % 2:
        return {"input_ids": text, "labels": text}
    image = torch.full((1, config.tokens_per_image), config.image_token_id)
    size = config.vision_config.image_size
    return {
        "input_ids": torch.cat([text[:, :1], image, text[:, 1:]], 1),
        "labels": torch.cat([text[:, :1], torch.full_like(image, -100), text[:, 1:]], 1),
        "pixel_values": torch.randn(1, 3, size, size, generator=generator),
    }


def main(checkpoint: str, strategy: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = LlavaSTFForConditionalGeneration.from_pretrained(checkpoint).train()
    model.model.vision_tower.requires_grad_(False)
    wrapped = model
    if strategy == "ddp":
        wrapped = DistributedDataParallel(model)
    elif strategy == "fsdp2":
        mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    losses = []
    for step in range(STEPS):
        # A single process takes both batches, one after the other; two ranks take one each, the other way round
        # in every second step.
        mine = [0, 1] if ranks == 1 else [(rank + step) % 2]
        total = torch.zeros(())
        for half in mine:
            loss = wrapped(**batch(model, 2 * step + half)).loss / len(mine)
            loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / ranks)
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        Path(output).write_text(json.dumps(losses))
    # DDP's reducer must not outlive the process group, see `training/run.py`.
    del wrapped, optimizer, loss
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
