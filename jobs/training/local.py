"""A training in this process, without Ray: for notebooks, for machines without it, to debug; as one of torchrun's ranks too."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepskip import trainer
from deepskip.config import Config, workers_range
from deepskip.jobs import journal, runs
from deepskip.jobs.settings import STOPPED, stop
from deepskip.jobs.training import preemption, share
from deepskip.jobs.training.console import Console, note_skipped
from deepskip.jobs.training.events import Event, Measured, SampleSkipped, Started


@dataclass
class Ranks:
    """This process among those that train together; told: whether all know the run's folder, or that there is none."""

    rank: int
    world_size: int
    device: torch.device
    threads: int
    told: bool = False


@contextmanager
def ranks(config: Config) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or be alone, while the block runs."""
    rank, world_size, local, neighbours = (
        int(os.environ.get(name, alone))
        for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    gpu = torch.cuda.is_available() and config.cluster.gpu is not False
    if config.cluster.gpu and not gpu:
        stop("cluster.gpu is true, but torch sees no GPU here")
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    found = Ranks(
        rank, world_size, device, int(config.cluster.cpus_per_worker or len(os.sched_getaffinity(0)) / neighbours)
    )
    if world_size == 1:
        yield found
        return
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=config.cluster.collective_timeout))
    try:
        yield found
    finally:
        dist.destroy_process_group()


def fit(config: Config, run: runs.Run, run_id: str | None, tracker: Any, ranks: Ranks) -> dict[str, Any]:
    """Train as rank 0 and pass on what all this tells; returns the trainer's summary.

    Ends the program, with an `error:` line, for a fault of the data, the weights or the disk; with STOPPED after a SIGTERM.
    """
    console = Console(config, run, tracker)
    one_of = f"{ranks.world_size} ranks" if ranks.world_size > 1 else "1 rank"
    if (asked := workers_range(config.cluster.workers)) and not asked[0] <= ranks.world_size <= asked[1]:
        print(
            f"warning: cluster.workers is {config.cluster.workers}, which is for Ray: here train as many as torchrun starts",
            flush=True,
        )
    print(f"training {run.name} in this process, {one_of}, {config.optim.steps} steps", flush=True)

    def tell(event: Event) -> None:
        if isinstance(event, Started) and event.step:
            print(f"resuming at step {event.step}", flush=True)
        if isinstance(event, Measured):
            event = replace(
                event, stamp=journal.write_down(run.folder / runs.JOURNAL, event.kind, event.step, event.values)
            )
        console.take(event)

    agree(ranks, (str(run.folder), run_id))
    summary = train(config, run.folder, run_id, tell, ranks)
    return summary | {"bad_samples": console.finish()}


def follow(config: Config, ranks: Ranks) -> None:
    """Train as another rank than 0, into the folder that rank 0 has claimed."""
    if told := agree(ranks, None):
        folder, run_id = told
        bad_samples = journal.BadSamples(Path(folder))

        def tell(event: Event) -> None:
            if isinstance(event, SampleSkipped):
                note_skipped(bad_samples, event.report)

        train(config, Path(folder), run_id, tell, ranks)


@contextmanager
def others_told(ranks: Ranks) -> Iterator[None]:
    """Tell the other ranks, where the block ends before it comes to train, that there is nothing to do."""
    try:
        yield
    finally:
        if not ranks.told:
            agree(ranks, None)


def agree(ranks: Ranks, told: tuple[str, str | None] | None) -> tuple[str, str | None] | None:
    """Give every rank the run's folder and MLflow run, which rank 0 knows; None where there is no training."""
    ranks.told = True
    if ranks.world_size == 1:
        return told
    told_to_all = [told]
    dist.broadcast_object_list(told_to_all, 0)
    return told_to_all[0]


def train(config: Config, folder: Path, run_id: str | None, tell: Any, ranks: Ranks) -> dict[str, Any]:
    """Train a rank's share; faults that say it all end the program."""
    if threading.current_thread() is threading.main_thread():
        preemption.set_handler()
    try:
        summary = share.train(
            config, folder, tell, preemption.asked,
            rank=ranks.rank, world_size=ranks.world_size, device=ranks.device, threads=ranks.threads,
            run_id=run_id,
        )  # fmt: skip
        if ranks.world_size > 1:
            # all have written down what they skipped
            dist.barrier()
        return summary
    except trainer.Preempted as error:
        print(f"warning: {error}", flush=True)
        sys.exit(STOPPED)
    except share.FATAL as error:
        stop(str(error))
