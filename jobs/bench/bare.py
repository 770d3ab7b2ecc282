"""Train the same steps on the same data in a bare loop; torchrun starts it, and it prints the seconds of each step."""

import json
import os
import sys
import time

import torch
import torch.distributed as dist

from deepskip.allocator import keep_freed_memory
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.stream import train_batches
from deepskip.jobs.settings import parse
from deepskip.jobs.training.allocation import cpus_of
from deepskip.jobs.training.share import data_info
from deepskip.training_step import TrainingStep


def main() -> None:
    """Train config.optim.steps steps on the CPU; rank 0 prints the seconds of each step as a JSON list."""
    config, *_ = parse("train", sys.argv[1:])
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(int(cpus_of(config.cluster)))
    keep_freed_memory()
    crops = Crops(config.data.crop, config.data.foreground_crops, config.run.seed, config.data.copy_paste)
    shards = Shards(f"{config.data.path}/train", config.data.normalize, crops)
    training = TrainingStep(config, data_info(shards.index, {}, config.data.normalize), torch.device("cpu"), world_size)
    training.distribute()
    batches = train_batches(
        shards, config.run.seed, config.optim.global_batch_size, 0, rank, world_size, 0, config.data.shuffle_window
    )
    training.network.train()
    seconds = []
    for _ in range(config.optim.steps or 0):
        start = time.perf_counter()
        training(next(batches))
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        print(json.dumps(seconds), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # Exit without cleanup; threads that torch may leave running do not matter.
    os._exit(0)


if __name__ == "__main__":
    main()
