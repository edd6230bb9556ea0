"""`train_ltd.py` on CPU ranks that shard by FSDP2, where accelerate falls back to DDP, whatever was asked for."""

import sys

import accelerate
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import train_ltd


class ShardingAccelerator(accelerate.Accelerator):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        plugin = FullyShardedDataParallelPlugin()  # from the variables that `accelerate launch` makes of its file
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)  # as AcceleratorState does it on GPUs
        for state in (AcceleratorState._shared_state, PartialState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin

    def prepare(self, *args):
        assert self.gradient_state.plugin_kwargs["sync_each_batch"]  # else gradients lie whole on every rank
        prepared = super().prepare(*args)
        shares = [p.to_local().numel() / p.numel() for p in prepared[0].parameters()]
        print(f"{self.num_processes} ranks, each with {sum(shares) / len(shares):.2f} of a parameter")
        return prepared


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_ltd.Accelerator = ShardingAccelerator
    train_ltd.main(train_ltd.parse_args(sys.argv[1:]))
