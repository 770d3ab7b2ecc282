"""What asks a training worker to stop: SIGTERM to its process, or Ray draining one of the workers' nodes.

Ray runs the training in a thread, and only a main thread can set a signal's handler: the worker's actor is asked to. This is
a module of its own because what `python -m jobs.train` defines is copied to workers, and a flag must be one and the same.
"""

import signal
import threading
from contextlib import suppress
from typing import Any

_asked = threading.Event()


def listen() -> None:
    """Makes the first SIGTERM to this worker ask for a stop; a second one ends the process, as Ray has it."""
    import ray

    ray.get(ray.get_runtime_context().current_actor.__ray_call__.remote(_set_handler))


def _set_handler(actor: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: object) -> None:
        _asked.set()
        signal.signal(signal.SIGTERM, before)

    _asked.clear()
    signal.signal(signal.SIGTERM, ask)


def requested() -> bool:
    """Says whether this worker was asked to stop; cheap enough for every step."""
    return _asked.is_set() or _draining()


def _draining() -> bool:
    # ray.train.get_preemption_info asks all workers at once, which is too slow for every step; this is what it asks them for
    with suppress(ImportError, AttributeError, RuntimeError):
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
    return False
