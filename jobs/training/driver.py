"""The driver of a training: starts the workers on Ray, and passes on what they tell while they train."""

import os
import signal
import sys
import threading
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchTrainer

from deepskip.config import Config
from deepskip.jobs import runs
from deepskip.jobs.settings import STOPPED, listen_to_sigterm, stop
from deepskip.jobs.training import allocation, process_group, restarts
from deepskip.jobs.training import events as told
from deepskip.jobs.training.console import Console
from deepskip.jobs.training.worker import train_worker

POLL_SECONDS = 0.5
# a job that is stopped waits so long for its workers' last checkpoint; less than heads give it (RAY_JOB_STOP_WAIT_TIME_S)
STOP_SECONDS = 15.0


class Driver:
    """Takes the workers' events and passes them on: to the terminal, to the tracker, to the run's folder.

    Attributes:
        summary: the trainer's, when the training is done.
        fatal: why the training must end, where it must.
    """

    def __init__(self, config: Config, run: runs.Run, tracker: Any, queue: Any, elastic: bool) -> None:
        self.config, self.queue, self.elastic = config, queue, elastic
        self.console = Console(config, run, tracker)
        self.summary: dict[str, Any] | None = None
        self.fatal: str | None = None
        self.policy = restarts.RestartPolicy(config.cluster, config.run.checkpoint_every)
        self.done, self.stopped = threading.Event(), threading.Event()
        self.follower = threading.Thread(target=self.follow, daemon=True)

    def deliver(self) -> None:
        """Pass on all events since the last call; one thread at a time calls."""
        for event in ray.get(self.queue.drain.remote(), timeout=self.config.cluster.collective_timeout):
            self.take(event)

    def take(self, event: told.Event) -> None:
        """Pass on one event."""
        match event:
            case told.Measured("train", step):
                self.policy.came_to(step)
            case told.Started(step, workers):
                self.policy.started(step)
                if self.policy.starts > 1:
                    print(f"resuming at step {step} with {workers} worker{'s' * (workers > 1)}", flush=True)
            case told.WorkersFailed(text):
                self.policy.failed(text)
                if self.fatal is None:
                    print(f"warning: the workers stopped: {text}", flush=True)
            case told.Stopped(text):
                print(f"warning: {text}", flush=True)
                self.stopped.set()
            case told.Fatal(text):
                self.fatal = text
            case told.Finished(summary):
                self.summary = summary
        self.console.take(event)

    def follow(self) -> None:
        """Deliver until the training ends; where it cannot go on, have the main thread leave Ray's fit."""
        while not self.done.wait(POLL_SECONDS):
            try:
                self.deliver()
            except Exception as error:
                # with nobody to listen the training would go on unseen
                self.fatal = f"what the workers told could not be passed on: {error!r}"
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if self.elastic:
                allocation.look_at_machines()
            if self.fatal is None and (reason := self.policy.reason_to_give_up()):
                self.fatal = reason
                # only the main thread can leave trainer.fit
                os.kill(os.getpid(), signal.SIGTERM)

    def run(self, trainer: TorchTrainer) -> dict[str, Any]:
        """Run the training to its end and return its summary; ends the program where it fails or is stopped."""
        self.follower.start()
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            self.end()
            if self.fatal is None:
                stop(f"the training failed:\n{error}")
        except SystemExit:
            if self.fatal is None:
                if self.policy.waiting_since is None:
                    self.stopped.clear()
                    self.queue.stop.remote()
                    if not self.stopped.wait(STOP_SECONDS):
                        print(
                            f"warning: the workers have not said within {STOP_SECONDS:g} s that they stopped; the training "
                            "goes on from the newest checkpoint that is whole",
                            flush=True,
                        )
                # ray makes 1 of whatever status a program ends with inside of its calls
                sys.exit(STOPPED)
        finally:
            self.done.set()
            # what it drained and has not passed on is in nobody else's hands. It waits for no server, and for the queue no
            # longer than the collective timeout
            self.follower.join()
        if self.fatal is None:
            self.end()
        bad_samples = self.console.finish()
        if self.fatal is not None:
            stop(self.fatal)
        assert self.summary is not None
        return self.summary | {"bad_samples": bad_samples}

    def end(self) -> None:
        """Deliver what is left, after the follower has ended."""
        self.done.set()
        self.follower.join()
        self.deliver()


def fit(config: Config, run: runs.Run, run_id: str | None, tracker: Any) -> dict[str, Any]:
    """Run the training on Ray and pass on what it tells while it runs; returns the trainer's summary."""
    requested = config.cluster
    allocation.start_ray()
    # ray has put itself before our handler, and would abort the process 3 s after the signal
    listen_to_sigterm()
    allocated = allocation.resources(requested)
    queue = ray.remote(told.EventQueue).options(**allocation.beside_driver()).remote(run.folder / runs.JOURNAL)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "run": str(run.folder), "run_id": run_id, "queue": queue},
        scaling_config=allocation.scaling_config(requested, allocated),
        torch_config=process_group.ProcessGroup(timeout_s=requested.collective_timeout),
        run_config=RunConfig(
            name="ray",
            storage_path=str(run.folder),
            # how often is for the driver to say, which sees whether the training came further
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[restarts.FailureReports(queue)],
        ),
    )
    allocation.claim_machines(trainer, run.folder / runs.MACHINES)
    print(f"training {run.name} on {allocated}, {config.optim.steps} steps", flush=True)
    return Driver(config, run, tracker, queue, allocated.fewest < allocated.most).run(trainer)
