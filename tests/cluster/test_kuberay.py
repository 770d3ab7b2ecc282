"""The manifests of cluster/kuberay are valid for Kubernetes and KubeRay, and have what DeepSkip needs."""

import base64
import copy
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kuberay_schema import SCHEMAS
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

from deepskip.cluster import preempt
from deepskip.jobs.settings import parse

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kuberay"
KUBERNETES = "1.37"
RESOURCES = [
    (path.name, document) for path in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]
NAMES = [f"{name}-{document['kind']}-{document['metadata']['name']}" for name, document in RESOURCES]


def check(document: dict[str, Any]) -> None:
    """Check that the API server and KubeRay accept a resource and drop no field of it."""
    if document["kind"] not in SCHEMAS:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.validate(document, SCHEMAS[document["kind"]])
    for template in pod_templates(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"} | template["metadata"]}
        kubernetes_validate.validate(pod | {"spec": template["spec"]}, KUBERNETES, strict=True)


def pod_templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    if document["kind"] == "Deployment":
        return [document["spec"]["template"]]
    if document["kind"] not in SCHEMAS:
        return []
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def of_kind(kind: str) -> dict[str, Any]:
    return copy.deepcopy(next(document for _, document in RESOURCES if document["kind"] == kind))


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


@pytest.mark.parametrize("document", [document for _, document in RESOURCES], ids=NAMES)
def test_the_schemas_accept_it(document: dict[str, Any]) -> None:
    check(document)


def put(document: Any, path: str, value: Any) -> None:
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        document = document[key]
    document[last] = value


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", "spec.enableInTreeAutoScaling", True),
        ("RayCluster", "spec.authOptions.secret", "x"),
        ("RayCluster", "spec.workerGroupSpecs.0.minReplicas", "1"),
        ("RayCluster", "spec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("RayCluster", "spec.headGroupSpec.template.spec.containers.0.readinesProbe", {}),
        ("RayCluster", "spec.workerGroupSpecs.0.template.spec.volumes.0.persistentVolumeClaim", {"name": "x"}),
        ("RayJob", "spec.backofLimit", 3),
        ("RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.env.0.value", 1),
        ("NetworkPolicy", "spec.ingres", []),
    ],
)
def test_the_schemas_refuse_a_wrong_field(kind: str, path: str, value: Any) -> None:
    document = of_kind(kind)
    put(document, path, value)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(document)


def test_the_job_brings_the_same_cluster_up() -> None:
    assert of_kind("RayJob")["spec"]["rayClusterSpec"] == of_kind("RayCluster")["spec"]


def test_the_ray_version_is_the_locked_one() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    found = re.search(r"^ray==(.*)$", lock, re.MULTILINE)
    assert found
    assert of_kind("RayCluster")["spec"]["rayVersion"] == found[1]


def test_the_jobs_settings_are_known_and_fit_the_cluster() -> None:
    spec = of_kind("RayJob")["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:4] == ["python", "-u", "-m", "deepskip.jobs.train"]
    workers = words.index("--cluster.workers")
    group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    assert yaml.safe_load(words[workers + 1]) == [group["minReplicas"], group["maxReplicas"]]
    # The run has a name. Without one, a second try would be a second run.
    config, *_ = parse("train", words[4:workers] + words[workers + 2 :])
    assert config.run.name
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (config.cluster.cpus_per_worker or 1) <= int(limits["cpu"])
    assert limits["nvidia.com/gpu"] == 1
    mounts = {mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert "/shared" in mounts
    assert config.run.storage.startswith("/shared/")
    assert config.data.path.startswith("/shared/")


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "Deployment"])
def test_pods_are_locked_down(kind: str) -> None:
    for template in pod_templates(of_kind(kind)):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_ray_asks_for_the_token_and_recovers_fast(kind: str) -> None:
    document = of_kind(kind)
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    assert spec["authOptions"] == {"mode": "token", "secretName": "deepskip-ray"}
    for template in pod_templates(document):
        variables = environment(template["spec"]["containers"][0])
        assert variables["RAY_AUTH_MODE"] == "token"
        assert variables["RAY_AUTH_TOKEN"] == {"secretKeyRef": {"name": "deepskip-ray", "key": "auth_token"}}
        assert float(variables["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]) == 0.5
        assert float(variables["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) < 60
        assert (
            int(variables["RAY_health_check_period_ms"]) * int(variables["RAY_health_check_failure_threshold"]) < 15000
        )
        assert any(
            volume.get("emptyDir", {}).get("medium") == "Memory" and mount["mountPath"] == "/dev/shm"
            for volume in template["spec"]["volumes"]
            for mount in template["spec"]["containers"][0]["volumeMounts"]
            if mount["name"] == volume["name"]
        )
    worker = spec["workerGroupSpecs"][0]["template"]["spec"]
    command = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:3] == ["python", "-m", "deepskip.cluster.preempt"]
    assert float(command[command.index("--seconds") + 1]) < worker["terminationGracePeriodSeconds"]


def test_what_is_referred_to_is_there() -> None:
    claims = {document["metadata"]["name"] for _, document in RESOURCES if document["kind"] == "PersistentVolumeClaim"}
    page = (ROOT / "docs" / "cluster" / "kuberay.md").read_text()
    for _, document in RESOURCES:
        for template in pod_templates(document):
            volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
            for volume in volumes.values():
                claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                assert claim is None or claim in claims
            for container in template["spec"]["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
                for value in environment(container).values():
                    if isinstance(value, dict):
                        reference = value["secretKeyRef"]
                        # Secrets are in no file. The page says how to create them.
                        assert f"create secret generic {reference['name']}" in page
                        assert reference["key"] in page
    assert not [document for _, document in RESOURCES if document["kind"] == "Secret"]


def test_the_network_is_closed_to_other_namespaces() -> None:
    policies = [document["spec"] for _, document in RESOURCES if document["kind"] == "NetworkPolicy"]
    apps = {template["metadata"]["labels"]["app"] for _, document in RESOURCES for template in pod_templates(document)}
    assert {policy["podSelector"]["matchLabels"]["app"] for policy in policies} == apps
    for policy in policies:
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        for rule in policy["ingress"]:
            for peer in rule["from"]:
                # Peers match by label, so everything else in the namespace is excluded.
                if peer.get("podSelector", {}).get("matchLabels") == {"app": "deepskip-ray"}:
                    continue
                assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay-system"}
                assert [port["port"] for port in rule["ports"]] == [8265]
        for rule in policy["egress"]:
            for peer in rule["to"]:
                if "ipBlock" in peer:
                    # A machine's own addresses are excluded, since clouds hand out credentials there.
                    assert "169.254.0.0/16" in peer["ipBlock"]["except"]
                    assert {port["port"] for port in rule["ports"]} == {443, 6443}
                elif "namespaceSelector" in peer:
                    assert {port["port"] for port in rule["ports"]} == {53}
                else:
                    assert peer["podSelector"]["matchLabels"]["app"] in apps


def test_the_submitter_is_locked_down_as_the_others() -> None:
    template = of_kind("RayJob")["spec"]["submitterPodTemplate"]
    assert template["metadata"]["labels"] == {"app": "deepskip-ray"}
    pod = template["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_administrators_password_is_in_its_own_pod_alone() -> None:
    for _, document in RESOURCES:
        for template in pod_templates(document):
            for container in template["spec"]["containers"]:
                for name, value in environment(container).items():
                    named = value.get("secretKeyRef", {}).get("name") if isinstance(value, dict) else None
                    assert named != "deepskip-mlflow" or document["kind"] == "Deployment", name


def test_services_are_within_the_cluster() -> None:
    for _, document in RESOURCES:
        if document["kind"] == "Service":
            assert document["spec"]["type"] == "ClusterIP"


def test_the_dockerfile_copies_what_is_there_and_ends_as_no_root() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert all((ROOT / word).exists() for word in copied)
    kept = {line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert copied == kept
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000:1000"


@pytest.mark.parametrize("hears", [True, False])
def test_preempt_tells_ray_or_else_the_training_workers(monkeypatch: pytest.MonkeyPatch, hears: bool) -> None:
    # Only this test uses the title, so that other trainings on this machine continue.
    title = f"ray::Test{os.getpid()}"
    assert preempt.WORKER == "ray::RayTrainWorker"
    assert RayTrainWorker.__name__ == "RayTrainWorker"
    monkeypatch.setattr(preempt, "WORKER", title)
    told: list[str] = []

    def ray(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        told.extend(command)
        if hears:
            # The training ends its workers by itself.
            os.kill(worker.pid, signal.SIGUSR1)
        return subprocess.CompletedProcess(command, 0 if hears else 1)

    monkeypatch.setattr(preempt.subprocess, "run", ray)

    monkeypatch.setenv("RAY_AUTH_TOKEN", "ours")

    def process(title: str, cluster_of: str = "ours") -> subprocess.Popen[str]:
        # Ray's setproctitle leaves the title in argv[0].
        code = (
            "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (print('asked'), sys.exit())); "
            "signal.signal(signal.SIGUSR1, lambda *_: sys.exit()); print('up', flush=True); sys.stdin.read()"
        )
        return subprocess.Popen(
            [title, "-c", code], executable=sys.executable, env=os.environ | {"RAY_AUTH_TOKEN": cluster_of},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    worker, other, stranger = process(f"{title}.poll"), process("ray::EventQueue"), process(f"{title}.poll", "theirs")
    try:
        for each in (worker, other, stranger):
            assert each.stdout is not None
            assert each.stdout.readline() == "up\n"
        assert preempt.preempt(20) == (1, 0)
        assert worker.stdout is not None
        assert worker.stdout.read() == ("" if hears else "asked\n")
        assert told[told.index("drain-node") :][:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        assert told[-2:] == ["--deadline-remaining-seconds", "20"]
        assert (other.poll(), stranger.poll()) == (None, None)
    finally:
        for each in (worker, other, stranger):
            each.kill()
            each.communicate()


def test_mlflow_as_deployed_asks_for_a_password_and_refuses_other_hosts(tmp_path: Path) -> None:
    pytest.importorskip("flask_wtf")
    container = pod_templates(of_kind("Deployment"))[0]["spec"]["containers"][0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [argument.replace("/mlflow/", f"{tmp_path}/") for argument in container["args"]]
    arguments = [a for a in arguments if not a.startswith(("--host", "--port"))] + [
        "--host=127.0.0.1",
        f"--port={port}",
    ]
    secrets = {"username": "someone", "password": "a long password", "secret_key": "key"}
    variables = {
        name: value if isinstance(value, str) else secrets[value["secretKeyRef"]["key"]]
        for name, value in environment(container).items()
    }
    log = (tmp_path / "log").open("wb")
    server = subprocess.Popen(
        [sys.executable, *container["command"][1:], *arguments],
        cwd=tmp_path, env=os.environ | variables, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip

    def status(path: str, host: str = "deepskip-mlflow:5000", password: str | None = None) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host})
        if password is not None:
            request.add_header("Authorization", "Basic " + base64.b64encode(f"someone:{password}".encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    try:
        deadline = time.monotonic() + 90
        while status("/health") != 200:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.2)
        search = "/api/2.0/mlflow/experiments/search?max_results=1"
        assert status(search) == 401
        assert status(search, password="x" + secrets["password"]) == 401
        assert status(search, password=secrets["password"]) == 200
        assert status(search, host="evil.example", password=secrets["password"]) == 403
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
        log.close()
