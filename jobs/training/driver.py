"""The driver of a training: starts the workers on Ray, and processes the events that they send while they train."""

import contextlib
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig
from ray.train.torch import TorchTrainer

from deepskip import checkpoint
from deepskip.config import Config
from deepskip.jobs import report, runs
from deepskip.jobs.settings import STOPPED, check_norm, listen_to_sigterm, stop
from deepskip.jobs.training import allocation, process_group, reports, restarts
from deepskip.jobs.training import events as told
from deepskip.jobs.training.console import Console
from deepskip.jobs.training.worker import train_worker

if TYPE_CHECKING:
    # It imports MLflow, which need not be installed.
    from deepskip.jobs.tracking import Tracker
    from deepskip.trainer import Summary

POLL_SECONDS = 0.5
# A stopped job waits this long for its workers' last checkpoint. It is less than the time that Ray's head leaves the job
# (RAY_JOB_STOP_WAIT_TIME_S).
STOP_SECONDS = 15.0


class Driver:
    """Processes the workers' events: reports them on the terminal, to MLflow and in the run's folder, and ends the training.

    Attributes:
        config: the settings of the training.
        queue: handle of the EventQueue actor.
        elastic: whether the number of workers may change during the training.
        console: reports the events.
        folder: the run's folder.
        summary: the trainer's summary, once the training is done.
        fatal: why the training must end; None while it need not.
        policy: decides when a training whose workers fail is given up.
        done: set when `follow` shall end.
        stopped: set when the workers have written their last checkpoint.
        follower: the thread that runs `follow`.
    """

    def __init__(self, config: Config, run: runs.Run, tracker: "Tracker | None", queue: Any, elastic: bool) -> None:
        self.config, self.queue, self.elastic = config, queue, elastic
        self.console = Console(config, run, tracker)
        self.summary: Summary | None = None
        self.fatal: str | None = None
        self.policy = restarts.RestartPolicy(config.cluster)
        self.folder = run.folder
        self.done, self.stopped = threading.Event(), threading.Event()
        self.follower = threading.Thread(target=self.follow, daemon=True)

    def deliver(self) -> None:
        """Process all events since the last call; only one thread at a time may call this."""
        for event in ray.get(self.queue.drain.remote(), timeout=self.config.cluster.collective_timeout):
            self.take(event)

    def take(self, event: told.Event) -> None:
        """Process one event."""
        match event:
            case told.Measured("train", step):
                self.policy.came_to(step)
            case told.Started(step, workers):
                self.policy.started(step)
                if self.policy.starts > 1:
                    print(f"resuming at step {step} with {workers} worker{'s' * (workers > 1)}", flush=True)
            case told.WorkersFailed(text):
                self.policy.failed(text, newest_saved(self.folder))
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
        """Process events until the training ends; if it cannot continue, interrupt Ray's `fit` in the main thread."""
        while not self.done.wait(POLL_SECONDS):
            try:
                self.deliver()
            except Exception as error:
                # If nothing processes events, the training would continue unseen.
                self.fatal = f"the workers' events could not be processed: {error!r}"
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if self.elastic:
                allocation.look_at_machines()
            if self.fatal is None and (reason := self.policy.reason_to_give_up()):
                self.fatal = reason
                # Only the main thread can leave trainer.fit.
                os.kill(os.getpid(), signal.SIGTERM)

    def run(self, trainer: TorchTrainer) -> dict[str, Any]:
        """Run the training to its end and return its summary.

        Returns:
            The trainer's summary, with the number of skipped samples as "bad_samples".

        Raises:
            SystemExit: if the training fails (an `error:` line is printed), or with status STOPPED after a SIGTERM.
        """
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
                            f"warning: the workers did not confirm within {STOP_SECONDS:g} s that they stopped; the training "
                            "will resume from the newest complete checkpoint",
                            flush=True,
                        )
                # Ray replaces any exit status that is raised inside its calls by 1.
                sys.exit(STOPPED)
        finally:
            self.done.set()
            # The follower may hold events that it drained and has not processed, and nobody else has them. It waits for no
            # server, and for the queue no longer than the collective timeout.
            self.follower.join()
        if self.fatal is None:
            self.end()
        bad_samples = self.console.finish()
        if self.fatal is not None:
            stop(self.fatal)
        assert self.summary is not None
        return {**self.summary, "bad_samples": bad_samples}

    def end(self) -> None:
        """End the follower, and process the remaining events."""
        self.done.set()
        self.follower.join()
        self.deliver()


def fit(config: Config, run: runs.Run, run_id: str | None, tracker: "Tracker | None") -> dict[str, Any]:
    """Train on Ray, and report the training's progress while it runs.

    Args:
        config: the settings of the training.
        run: the run's folder, which this process has claimed.
        run_id: the MLflow run's id, stored in checkpoints; None without MLflow.
        tracker: sends metrics and images to MLflow; None without MLflow.

    Returns:
        The trainer's summary, with the number of skipped samples as "bad_samples".

    Raises:
        SystemExit: if the training cannot start, fails or is stopped; see `start_ray`, `resources` and `Driver.run`.
    """
    requested = config.cluster
    allocation.start_ray()
    # Ray has replaced our SIGTERM handler by its own, which would abort the process 3 s after the signal.
    listen_to_sigterm()
    allocated = allocation.resources(requested)
    check_norm(config, allocated.most)
    runs.choose_lanes(run, config, allocated.machines)
    # Ray would refuse to start with a record that a crash has cut short, or that another version of it wrote.
    shutil.rmtree(run.folder / reports.FOLDER, ignore_errors=True)
    queue = ray.remote(told.EventQueue).options(**allocation.beside_driver()).remote(run.folder / runs.JOURNAL)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "run": str(run.folder), "run_id": run_id, "queue": queue},
        scaling_config=allocation.scaling_config(requested, allocated),
        torch_config=process_group.ProcessGroup(timeout_s=requested.collective_timeout),
        run_config=RunConfig(
            name=reports.FOLDER,
            storage_path=str(run.folder),
            checkpoint_config=CheckpointConfig(num_to_keep=reports.KEPT),
            # The driver limits the number of restarts, since it sees whether the training advanced in between.
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[restarts.FailureReports(queue)],
        ),
    )
    allocation.claim_machines(trainer, run.folder / runs.MACHINES)
    print(f"training {run.name} on {allocated}, {report.steps_in_words(config)}", flush=True)
    return Driver(config, run, tracker, queue, allocated.fewest < allocated.most).run(trainer)


def newest_saved(run: Path) -> int | None:
    """Return the step of a run's newest checkpoint, or None if there is none or the folder cannot be listed."""
    with contextlib.suppress(OSError):
        for path in checkpoint.step_paths(run):
            return int(path.stem.removeprefix("step-"))
    return None
