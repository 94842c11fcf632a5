"""Runs `python -m training` with accelerate's FSDP on CPU, where accelerate itself would fall back to DDP."""

import runpy
from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

create = AcceleratorState.__init__


def create_with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    create(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = create_with_fsdp  # type: ignore[method-assign]
runpy.run_module("training", run_name="__main__", alter_sys=True)
