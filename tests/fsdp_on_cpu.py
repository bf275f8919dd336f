"""The command, under an Accelerate that shards on CPUs too: torch's FSDP2 can, through gloo; Accelerate wants GPUs."""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from distill.cli import main

_made = AcceleratorState.__init__


def _as_on_gpus(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    """What ``AcceleratorState`` does where several GPUs were found."""
    _made(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    if os.environ.get("SHARD_ON_CPU"):
        AcceleratorState.__init__ = _as_on_gpus
    main()
