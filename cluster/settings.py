"""Settings of Ray, as environment variables, under which lost workers and machines are noticed soon."""

from collections.abc import Mapping

# of the head, and of every machine that joins it
NODE_SETTINGS = {
    # a machine that does not answer for 2 to 3 s is lost; by ray's defaults it is after 16
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    # a machine that lost its head ends its workers after this; by ray's default they go on alone for a minute
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    # by ray's default workers run at niceness 15: beside other work a training would have three hundredths of a core
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# of whoever calls trainer.fit; ray train passes them on to its controller and workers
DRIVER_SETTINGS = {
    # ray train looks after its workers this often: its default of 2 s makes recovery slow, and 0.1 s took an eighth of a core
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # a group for which a lost machine has left no room is given up after this, and planned anew; by default after 60 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4",
    # trainings look this often whether a node is drained; by default every 5 s
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LOOPBACK_ONLY = {
    # a Ray of one machine listens on loopback alone only where it is told that this system knows no clusters
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # its ports for metrics ask for no token, and answer to any name: pages of other sites could be led to them; -1 is none
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
# what Python, curl and gRPC ask by a proxy that the environment names
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


def past_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables under which no program asks a proxy for loopback; {} where the environment names no proxy.

    A company's http_proxy would be asked for the head's page, with its token, and Ray would never be ready. no_proxy and
    NO_PROXY keep what they have: programs read either one, the small letters first.
    """
    exceptions = ("no_proxy", "no_grpc_proxy")
    named = {name.lower() for name, value in environment.items() if name.lower().endswith("_proxy") and value}
    if not named - {*exceptions}:
        return {}
    found = {}
    for name, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy"), ("no_grpc_proxy", "")):
        before = environment.get(name) or environment.get(other) or ""
        # gRPC reads its own where that is set, and else no_proxy; * alone is all hosts
        if (name == "no_grpc_proxy" and not before) or before.strip() == "*":
            continue
        hosts = [host.strip() for host in before.split(",") if host.strip()]
        found[name] = ",".join([*hosts, *(host for host in LOOPBACK_HOSTS if host not in hosts)])
    return found


def of_loopback(address: str | None) -> dict[str, str]:
    """Return what a driver needs for a Ray of this machine alone: where no cluster is named, or a head on loopback.

    Without it a driver looks for such a head at the machine's other address, and waits for minutes. address: of RAY_ADDRESS.
    """
    host = (address or "127.0.0.1").partition("://")[2] or address or "127.0.0.1"
    return LOOPBACK_ONLY if host.startswith(("127.", "localhost", "[::1]", "local")) else {}
