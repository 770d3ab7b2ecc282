"""Requests to a training worker to stop: SIGTERM to its process or to the job, or Ray draining one of the workers' nodes.

Ray runs the training in a thread, and only the main thread can set a signal handler. So the worker's actor sets it.
"""

import signal
import threading
import time
from contextlib import suppress
from typing import Any

POLL_SECONDS = 1.0

_asked = threading.Event()


def listen() -> None:
    """Make the first SIGTERM to this worker request a stop; a second one ends the process, with Ray's own handler."""
    import ray

    ray.get(ray.get_runtime_context().current_actor.__ray_call__.remote(_in_actor))


def follow(queue: Any) -> None:
    """Start a thread that requests a stop of this worker when the event queue reports that the training is to end.

    Args:
        queue: handle of the EventQueue actor.
    """
    threading.Thread(target=_poll, args=[queue], daemon=True).start()


def _poll(queue: Any) -> None:
    import ray

    # If the driver is gone, the queue is too, and there is nothing left to poll.
    with suppress(ray.exceptions.RayError):
        while not ray.get(queue.is_over.remote()):
            time.sleep(POLL_SECONDS)
        _asked.set()


def _in_actor(actor: Any) -> None:
    set_handler()


def set_handler(*signals: int) -> list[int]:
    """Make the first SIGTERM to this process request a stop; a second one goes to the handler that was set before.

    Args:
        *signals: other signals that do the same.

    Returns:
        A list to which the number of the first signal is appended.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, *signals)}
    heard: list[int] = []

    def ask(number: int, frame: object) -> None:
        heard.append(number)
        _asked.set()
        # torchrun sends a SIGTERM after Ctrl-C.
        signal.signal(number, before[number])

    _asked.clear()
    for number in before:
        signal.signal(number, ask)
    return heard


def asked() -> bool:
    """Return whether a SIGTERM or the driver requested a stop."""
    return _asked.is_set()


def requested() -> bool:
    """Return whether a SIGTERM, the driver or Ray requested a stop of this worker; cheap enough for every step."""
    return asked() or _draining()


def _draining() -> bool:
    # ray.train.get_preemption_info asks all workers at once, which is too slow for every step. This reads the value that
    # each worker would answer with.
    with suppress(ImportError, AttributeError, RuntimeError):
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
    return False
