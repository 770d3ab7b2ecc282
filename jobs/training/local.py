"""Train in this process, without Ray: for notebooks, for debugging, and on machines without Ray; also as a rank of torchrun."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from deepskip import trainer
from deepskip.config import Config, workers_range
from deepskip.jobs import journal, report, runs
from deepskip.jobs.settings import STOPPED, check_norm, stop
from deepskip.jobs.training import preemption, share
from deepskip.jobs.training.console import Console, note_skipped
from deepskip.jobs.training.events import Event, Measured, SampleSkipped, Started

if TYPE_CHECKING:
    # It imports MLflow, which need not be installed.
    from deepskip.jobs.tracking import Tracker


# A run's folder, its MLflow run id, its number of lanes, and the absolute path of its data.
Told = tuple[str, str | None, Any, str]


@dataclass
class Ranks:
    """This process's place among the ranks that train together.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of ranks.
        device: where this rank trains.
        neighbours: number of ranks on this machine.
        threads: number of CPU threads of this rank.
        told: whether rank 0 has sent the run's folder to all ranks, or that there is no training.
    """

    rank: int
    world_size: int
    device: torch.device
    neighbours: int
    threads: int
    told: bool = False


@contextmanager
def ranks(config: Config) -> Iterator[Ranks]:
    """Join the process group of the ranks that torchrun started, while the block runs; without torchrun, be the only rank.

    Args:
        config: the settings of the training.

    Yields:
        This process's rank, device and number of threads.

    Raises:
        SystemExit: if cluster.gpu is true and torch finds no GPU; an `error:` line is printed.
    """
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
    threads = int(config.cluster.cpus_per_worker or len(os.sched_getaffinity(0)) / neighbours)
    found = Ranks(rank, world_size, device, neighbours, threads)
    if world_size == 1:
        yield found
        return
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=config.cluster.collective_timeout))
    try:
        yield found
    finally:
        dist.destroy_process_group()


def fit(config: Config, run: runs.Run, run_id: str | None, tracker: "Tracker | None", ranks: Ranks) -> dict[str, Any]:
    """Train as rank 0, and report the training's progress.

    Args:
        config: the settings of the training.
        run: the run's folder, which this process has claimed.
        run_id: the MLflow run's id, stored in checkpoints; None without MLflow.
        tracker: sends metrics and images to MLflow; None without MLflow.
        ranks: this process's place among the ranks.

    Returns:
        The trainer's summary, with the number of skipped samples as "bad_samples".

    Raises:
        SystemExit: for one of share.FATAL's errors, such as bad data or a non-finite loss; an `error:` line is printed. After
            a SIGTERM the status is STOPPED.
    """
    console = Console(config, run, tracker)
    one_of = f"{ranks.world_size} ranks" if ranks.world_size > 1 else "1 rank"
    if (asked := workers_range(config.cluster.workers)) and not asked[0] <= ranks.world_size <= asked[1]:
        here = "torchrun sets the number of ranks" if "TORCHELASTIC_RUN_ID" in os.environ else (
            "--local trains as one rank; for more start it by torchrun, or without --local"
        )  # fmt: skip
        print(f"warning: cluster.workers is {config.cluster.workers}, which is for Ray: {here}", flush=True)
    print(f"training {run.name} in this process, {one_of}, {report.steps_in_words(config)}", flush=True)

    def tell(event: Event) -> None:
        if isinstance(event, Started) and event.step:
            print(f"resuming at step {event.step}", flush=True)
        if isinstance(event, Measured):
            event = replace(
                event, stamp=journal.write_down(run.folder / runs.JOURNAL, event.kind, event.step, event.values)
            )
        console.take(event)

    check_norm(config, ranks.world_size)
    runs.choose_lanes(run, config, -(-ranks.world_size // ranks.neighbours))
    agree(ranks, (str(run.folder), run_id, config.data.lanes, config.data.path))
    summary = train(config, run.folder, run_id, tell, ranks)
    return {**summary, "bad_samples": console.finish()}


def follow(config: Config, ranks: Ranks) -> None:
    """Train as a rank other than 0, in the folder that rank 0 has claimed; return at once if rank 0 reports no training."""
    if told := agree(ranks, None):
        folder, run_id, config.data.lanes, config.data.path = told
        bad_samples = journal.BadSamples(Path(folder))

        def tell(event: Event) -> None:
            if isinstance(event, SampleSkipped):
                note_skipped(bad_samples, event.report)

        train(config, Path(folder), run_id, tell, ranks)


@contextmanager
def others_told(ranks: Ranks) -> Iterator[None]:
    """Release the other ranks if the block ends before it trains, for example because of an error.

    Args:
        ranks: this process's place among the ranks; it is rank 0.
    """
    try:
        yield
    finally:
        if not ranks.told:
            agree(ranks, None)


def agree(ranks: Ranks, told: Told | None) -> Told | None:
    """Broadcast what the ranks must know of a run from rank 0 to all ranks; every rank must call this.

    Args:
        ranks: this process's place among the ranks; its `told` is set.
        told: on rank 0 the folder, the MLflow run id and the number of lanes, or None if there is no training. Other ranks
            pass None.

    Returns:
        What rank 0 passed.
    """
    ranks.told = True
    if ranks.world_size == 1:
        return told
    told_to_all = [told]
    dist.broadcast_object_list(told_to_all, 0)
    return told_to_all[0]


def train(
    config: Config, folder: Path, run_id: str | None, tell: Callable[[Event], None], ranks: Ranks
) -> trainer.Summary:
    """Train this rank's share of a run.

    Args:
        config: the settings of the training.
        folder: the run's folder.
        run_id: the MLflow run's id, or None.
        tell: takes every event of this rank.
        ranks: this process's place among the ranks.

    Returns:
        The trainer's summary.

    Raises:
        SystemExit: for one of share.FATAL's errors (an `error:` line is printed), or with status STOPPED after a SIGTERM, and
            130 after Ctrl-C.
    """
    heard: list[int] = []
    interrupt = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is threading.main_thread():
        heard = preemption.set_handler(signal.SIGINT)
    try:
        summary = share.train(
            config, folder, tell, preemption.asked,
            rank=ranks.rank, world_size=ranks.world_size, device=ranks.device, ranks_here=ranks.neighbours,
            threads=ranks.threads, run_id=run_id,
        )  # fmt: skip
        if ranks.world_size > 1:
            # After this, all ranks have listed the samples that they skipped.
            dist.barrier()
        return summary
    except trainer.Preempted as error:
        print(f"warning: {error}", flush=True)
        sys.exit(128 + heard[0] if heard else STOPPED)
    except share.FATAL as error:
        stop(str(error))
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)
