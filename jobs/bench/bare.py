"""The same network, loss, optimizer and data in a bare loop; torchrun starts it, and it prints the seconds of each step."""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data_shards.crops import Crops
from data_shards.stream import Shards, train_batches
from deepskip import augment
from deepskip.allocator import keep_freed_memory
from deepskip.inference import normalize
from deepskip.loss import BCEDiceLoss
from deepskip.network import DeepSkipUNet
from deepskip.optimizer import build_optimizer, set_learning_rate
from deepskip.trainer import learning_rate
from jobs.settings import parse


def main() -> None:
    """Trains config.optim.steps steps on the CPU."""
    config, _ = parse("train", sys.argv[1:])
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(int(config.cluster.cpus_per_worker))
    keep_freed_memory()
    torch.manual_seed(config.run.seed)
    shards = Shards(
        f"{config.data.path}/train",
        config.data.normalize,
        Crops(config.data.crop, config.data.foreground_crops, config.run.seed, config.data.copy_paste),
    )
    index, optim = shards.index, config.optim
    network = DeepSkipUNet(index.bands, index.num_classes)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(optim, network)
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(optim.ema_decay), use_buffers=True)
    loss_of = BCEDiceLoss(config.loss.alpha, config.loss.beta, None, index.ignore_index, config.loss.eps)
    model = DistributedDataParallel(network) if world_size > 1 else network
    batches = train_batches(
        shards, config.run.seed, optim.global_batch_size, 0, rank, world_size, 0, config.data.shuffle_window
    )
    model.train()
    seconds = []
    for step in range(optim.steps):
        start = time.perf_counter()
        batch = next(batches)
        image = normalize(batch["image"], batch["mean"], batch["std"])
        draws = augment.draw(config.augment, config.run.seed, batch["epoch"], batch["sample"], index.bands)
        image, mask = augment.augment(config.augment, draws, image, batch["mask"].long(), index.ignore_index)
        set_learning_rate(optimizer, learning_rate(optim, step))
        logits = model(image.contiguous(memory_format=torch.channels_last))
        (loss_of(logits, mask, batch["weight"]) * world_size).backward()
        nn.utils.clip_grad_norm_(network.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(network)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        print(json.dumps(seconds), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # what the processes of torch leave running is of no interest
    os._exit(0)


if __name__ == "__main__":
    main()
