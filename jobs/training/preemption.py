"""What asks a training worker to stop: SIGTERM to its process or to the job, or Ray draining one of the workers' nodes.

Ray runs the training in a thread, and only a main thread can set a signal's handler: the worker's actor is asked to.
"""

import signal
import threading
import time
from contextlib import suppress
from typing import Any

POLL_SECONDS = 1.0

_asked = threading.Event()


def listen() -> None:
    """Make the first SIGTERM to this worker ask for a stop; a second one ends the process, as Ray has it."""
    import ray

    ray.get(ray.get_runtime_context().current_actor.__ray_call__.remote(_in_actor))


def follow(queue: Any) -> None:
    """Have this worker ask for a stop, too, when the driver says that the whole job is being stopped."""
    threading.Thread(target=_poll, args=[queue], daemon=True).start()


def _poll(queue: Any) -> None:
    import ray

    # a driver that is gone asks for nothing
    with suppress(ray.exceptions.RayError):
        while not ray.get(queue.is_over.remote()):
            time.sleep(POLL_SECONDS)
        _asked.set()


def _in_actor(actor: Any) -> None:
    set_handler()


def set_handler() -> None:
    """Make the first SIGTERM to this process ask for a stop, and the next one do what it did before."""
    before = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: object) -> None:
        _asked.set()
        signal.signal(signal.SIGTERM, before)

    _asked.clear()
    signal.signal(signal.SIGTERM, ask)


def asked() -> bool:
    """Tell whether a SIGTERM, or the driver, asked for a stop."""
    return _asked.is_set()


def requested() -> bool:
    """Tell whether this worker was asked to stop, by Ray too; cheap enough for every step."""
    return asked() or _draining()


def _draining() -> bool:
    # ray.train.get_preemption_info asks all workers at once, which is too slow for every step; this is what it asks them for
    with suppress(ImportError, AttributeError, RuntimeError):
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
    return False
