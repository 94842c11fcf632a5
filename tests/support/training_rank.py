"""One rank of `python -m training` on CPU; with accelerate's FSDP, where accelerate itself would fall back to DDP.

torchrun --nproc-per-node=2 training_rank.py OPTIONS
accelerate launch --config_file training/accelerate/fsdp2.yaml --num_processes 2 training_rank.py OPTIONS
"""

import gc
import sys
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from training.__main__ import main  # noqa: E402

create = AcceleratorState.__init__


def create_with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    create(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


def leave(self: PartialState, group: Any = None) -> None:
    reducers = [thing for thing in gc.get_objects() if isinstance(thing, DistributedDataParallel)]
    assert not reducers, "DDP outlives its process group: now and then gloo hangs or aborts on that"
    destroy_process_group(self, group)


destroy_process_group, PartialState.destroy_process_group = PartialState.destroy_process_group, leave
AcceleratorState.__init__ = create_with_fsdp  # type: ignore[method-assign]
sys.exit(main())
