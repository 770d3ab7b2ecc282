"""One worker of a training on Ray: it trains its rank's share, and sends events to the driver's queue."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.train.torch import get_device

from deepskip.config import Config
from deepskip.data_shards import trouble
from deepskip.jobs import runs
from deepskip.jobs.training import preemption
from deepskip.jobs.training.allocation import cpus_of
from deepskip.jobs.training.events import Event, Fatal, Finished, Measured, Panel, Stopped, Warned
from deepskip.jobs.training.reports import ValidationReports

# The driver imports this module too. The trainer, whose metrics take seconds to import, is imported on the workers alone.
if TYPE_CHECKING:
    from deepskip import trainer


def train_worker(settings: dict[str, Any]) -> None:
    """Train on one worker; Ray starts this on every worker, and again after a worker died.

    Args:
        settings: "config" (Config), "run" (the run's folder), "run_id" (of MLflow, or None) and "queue" (handle of the
            EventQueue actor).

    Raises:
        Exception: any error of `train`, after it was reported to the queue if the driver must know of it.
    """
    from deepskip import trainer
    from deepskip.jobs.training import share

    queue = settings["queue"]
    # After a failure that a restart would not fix, training again would only fail again.
    if ray.get(queue.is_over.remote()):
        return
    try:
        summary = train(settings)
    except trainer.Preempted as error:
        # Ray starts the workers again, and they resume at that checkpoint.
        if ray.train.get_context().get_world_rank() == 0:
            ray.get(queue.put.remote(Stopped(str(error))))
        raise
    except share.PASSING:
        # Ray starts the workers again, up to cluster.max_failures times without a new checkpoint.
        raise
    except share.FATAL as error:
        ray.get(queue.put.remote(Fatal(str(error))))
        raise
    except Exception as error:
        if text := trouble.in_words(error, runs.GOES_ON):
            ray.get(queue.put.remote(Fatal(text)))
        raise
    if ray.train.get_context().get_world_rank() == 0:
        ray.get(queue.put.remote(Finished(summary)))


def train(settings: dict[str, Any]) -> "trainer.Summary":
    """Train this worker's share.

    Args:
        settings: as in `train_worker`.

    Returns:
        The trainer's summary.

    Raises:
        Exception: the errors of `share.train`, and Ray's if the queue does not answer within the collective timeout.
    """
    from deepskip.jobs.training import share

    queue = settings["queue"]
    config: Config = settings["config"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    preemption.listen()
    if rank == 0:
        preemption.follow(queue)

    def tell(event: Event) -> None:
        taken = queue.put.remote(event)
        reports.take(event)
        if isinstance(event, Measured | Panel | Warned):
            # Workers whose driver is gone stop here.
            ray.get(taken, timeout=config.cluster.collective_timeout)

    run = Path(settings["run"])
    reports = ValidationReports(run if rank == 0 else None, lambda text: tell(Warned(text)))
    summary = share.train(
        config, run, tell, preemption.requested,
        rank=rank, world_size=world_size, device=get_device(), ranks_here=context.get_local_world_size(),
        threads=int(cpus_of(config.cluster)), run_id=settings["run_id"], validated=reports.validated,
    )  # fmt: skip
    reports.close()
    return summary
