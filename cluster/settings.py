"""Set Ray's environment variables so that lost workers and machines are detected quickly."""

from collections.abc import Mapping

# These apply to the head and to every machine that joins it.
NODE_SETTINGS = {
    # A machine that does not answer for 2 to 3 s counts as lost; Ray's default is 16 s.
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    # A machine that lost its head ends its workers after this time; by Ray's default they continue alone for a minute.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    # By Ray's default workers run at niceness 15; next to other load a training would get 3 % of a core.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# These apply to the process that calls trainer.fit; Ray Train passes them to its controller and workers.
DRIVER_SETTINGS = {
    # Ray Train polls its workers at this interval. Its default of 2 s makes recovery slow; 0.1 s took an eighth of a core.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # If a worker group cannot start after a machine is lost, it is planned anew after this time; the default is 60 s.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4",
    # Trainings check for drained nodes at this interval; the default is 5 s.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LOOPBACK_ONLY = {
    # A single-machine Ray listens on loopback only if it believes that this system supports no clusters.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray's metrics ports require no token and accept any host name, so other sites' pages could reach them (DNS rebinding).
    # -1 turns a port off.
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
# Python, curl and gRPC would send requests for these hosts to a proxy that the environment names.
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


def past_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables that exclude loopback from proxies, or {} if the environment names no proxy.

    Otherwise a company's http_proxy would receive requests to the head, with the token, and Ray would never be ready. The
    hosts in no_proxy and NO_PROXY are kept: programs read either one, the lower-case one first.

    Args:
        environment: Variables of the environment.
    """
    exceptions = ("no_proxy", "no_grpc_proxy")
    named = {name.lower() for name, value in environment.items() if name.lower().endswith("_proxy") and value}
    if not named - {*exceptions}:
        return {}
    found = {}
    for name, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy"), ("no_grpc_proxy", "")):
        before = environment.get(name) or environment.get(other) or ""
        # gRPC reads no_grpc_proxy if it is set, else no_proxy. A single * stands for all hosts.
        if (name == "no_grpc_proxy" and not before) or before.strip() == "*":
            continue
        hosts = [host.strip() for host in before.split(",") if host.strip()]
        found[name] = ",".join([*hosts, *(host for host in LOOPBACK_HOSTS if host not in hosts)])
    return found


def of_loopback(address: str | None) -> dict[str, str]:
    """Return the variables that a driver needs for a Ray on loopback, or {} if `address` is that of another machine.

    Without them a driver looks for such a head at the machine's other address, and waits for minutes.

    Args:
        address: Value of RAY_ADDRESS; None for a local Ray instance.
    """
    host = (address or "127.0.0.1").partition("://")[2] or address or "127.0.0.1"
    return LOOPBACK_ONLY if host.startswith(("127.", "localhost", "[::1]", "local")) else {}
