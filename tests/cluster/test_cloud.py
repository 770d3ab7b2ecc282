"""The cluster launcher's files are valid by Ray's schema, merged with its defaults as `ray up` merges them."""

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "cloud"
FILES = [FOLDER / "aws.yaml", FOLDER / "gcp.yaml"]


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_accepts_it(path: Path) -> None:
    config = prepare_config(read(path))
    validate_config(config)
    gpu = config["available_node_types"]["gpu"]
    assert config["max_workers"] == gpu["max_workers"] > gpu["min_workers"] == 1
    assert gpu["resources"]["GPU"] == 1
    assert "spot" in str(gpu["node_config"]).lower()
    # None of Ray's defaults is left, which install a nightly Ray.
    assert "wheels" not in str(config)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_refuses_a_wrong_field(path: Path) -> None:
    for change in ({"max_worker": 4}, {"idle_timeout_minutes": "10"}, {"auth": {"ssh_usr": "x"}}):
        with pytest.raises(jsonschema.ValidationError):
            validate_config(prepare_config(copy.deepcopy(read(path)) | change))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_doors_are_closed(path: Path) -> None:
    config = prepare_config(read(path))
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("cluster/cloud/ray.env" in command for command in starts)
    head = next(command for command in starts if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in str(config)
    # The token is mounted as a file and is in no command.
    assert "/home/ubuntu/.config/deepskip/token" in config["file_mounts"]
    assert "RAY_AUTH_TOKEN=" not in str(config)
    if config["provider"]["type"] == "aws":
        # Without a group of its own, the launcher makes one with SSH open to all.
        assert all("SecurityGroupIds" in node["node_config"] for node in config["available_node_types"].values())


def test_the_environment_that_ray_gets() -> None:
    # The shell reads the file, as in the start commands.
    script = f"set -a; . {FOLDER / 'ray.env'}; env"
    printed = subprocess.run(
        ["/bin/bash", "-c", script], env={"HOME": "/home/ubuntu"}, capture_output=True, text=True, check=True
    ).stdout
    found = dict(line.split("=", 1) for line in printed.splitlines())
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_AUTH_TOKEN_PATH"] in read(FILES[0])["file_mounts"]
    assert found["PATH"].startswith("/home/ubuntu/deepskip/.venv/bin:")
    assert float(found["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]) == 0.5
    assert float(found["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) < 60
    # Slurm and KubeRay get the same settings.
    others = (ROOT / "cluster/slurm/train.sbatch").read_text(), (ROOT / "cluster/kuberay/raycluster.yaml").read_text()
    fast = {
        name: value
        for name, value in found.items()
        if "HEALTH_CHECK" in name.upper() or "TIMEOUT" in name or "POLL" in name
    }
    assert len(fast) == 7
    for name, value in fast.items():
        assert f"{name}={value}" in others[0]
        assert f'{{name: {name}, value: "{value}"}}' in others[1]


def test_the_page_explains_what_is_to_be_replaced() -> None:
    page = (ROOT / "docs" / "cluster" / "cloud.md").read_text()
    for path in FILES:
        for name in set(re.findall(r"REPLACE_[A-Z_]*[A-Z]", path.read_text())):
            assert name in page, name
