"""Record what each worker of a training does; Ray Train loads it from RAY_TRAIN_CALLBACKS, without a change to jobs.

Before each step, a line has {"step", "samples": [[epoch, sample], ...] of weight 1, "time"}. After each step, rank 0
adds {"step", "loss", "time"}. A file begins with {"group", "rank", "world_size", "pid", "node"}.
"""

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerCallback

FOLDER, PACE, KILL_AT_RENAME = "RECORDER_FOLDER", "RECORDER_PACE", "kill-at-rename"


class Recorder(WorkerCallback):
    """A callback that the driver creates with the folder and the pace of its environment; each worker calls it."""

    def __init__(self) -> None:
        self.folder, self.pace = os.environ[FOLDER], float(os.environ[PACE])

    def after_init_train_context(self) -> None:
        """Wrap the trainer of this worker."""
        from deepskip import trainer

        folder, pace, train = Path(self.folder), self.pace, trainer.train
        kill_before_rename(folder / KILL_AT_RENAME)

        def recorded(config: Any, data: Any, **options: Any) -> dict[str, Any]:
            import torch.distributed as dist

            rank, world_size = options["rank"], options["world_size"]
            group = [f"{time.time_ns()}"]
            if world_size > 1:
                dist.broadcast_object_list(group)
            file = (folder / f"{group[0]}-{rank}-{uuid.uuid4().hex[:6]}.jsonl").open("a")

            def write(**line: Any) -> None:
                file.write(json.dumps(line) + "\n")
                file.flush()

            node = os.environ.get("DEEPSKIP_TEST_NODE")
            write(group=group[0], rank=rank, world_size=world_size, pid=os.getpid(), node=node)
            batches: Callable[[int], Iterator[Any]] = options["train_batches"]
            observe: Callable[[str, int, Any], None] = options["observe"]

            def recorded_batches(first: int) -> Iterator[Any]:
                for step, batch in enumerate(batches(first), first + 1):
                    samples = zip(batch["epoch"], batch["sample"], batch["weight"].tolist(), strict=True)
                    write(step=step, samples=[[e, s] for e, s, weight in samples if weight], time=time.time())
                    time.sleep(pace)
                    yield batch

            def recorded_observe(kind: str, step: int, values: dict[str, Any]) -> None:
                if kind == "train":
                    write(step=step, loss=values["loss"], time=time.time())
                observe(kind, step, values)

            options |= {"train_batches": recorded_batches, "observe": recorded_observe}
            return train(config, data, **options)

        trainer.train = recorded


def kill_before_rename(marker: Path) -> None:
    """Make this process kill itself once, at the rename of a step's checkpoint, if the marker exists."""

    def armed(rename: Callable[..., None]) -> Callable[..., None]:
        def killing(source: Any, target: Any, **options: Any) -> None:
            if Path(target).name.startswith("step-") and marker.exists():
                marker.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target, **options)

        return killing

    os.replace, os.rename = armed(os.replace), armed(os.rename)
