"""The server's metrics for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from deepskip.jobs.serving.answers import Answer

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one server, in a registry of their own.

    Attributes:
        content_type: content type of `text`.
        registry: Prometheus's registry of these metrics, and of the process's.
        requests: counts requests to /predict by status.
        waiting: number of requests without an answer.
        seconds: histogram of the time from a request's headers to its answer, s.
        stages: histogram of the time of each stage in a replica, s.
        batch: histogram of the number of images that went through the network together.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter("deepskip_requests", "requests to /predict", ["status"], registry=registry)
        self.waiting = Gauge("deepskip_waiting", "requests that have no answer yet", registry=registry)
        self.seconds = Histogram(
            "deepskip_seconds",
            "seconds from the headers of a request to its answer",
            buckets=SECONDS,
            registry=registry,
        )
        self.stages = Histogram(
            "deepskip_stage_seconds",
            "seconds of each stage in a replica",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batch = Histogram(
            "deepskip_batch_images",
            "images in the batch of an image, itself included",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )

    def observe(self, answer: Answer) -> None:
        """Add the batch size and the times of an answer."""
        self.batch.observe(answer.batch)
        for stage, seconds in answer.seconds.items():
            self.stages.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
