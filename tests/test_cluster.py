"""The cluster files against Ray's own validator, offline, and what `study check --cluster` says of faults."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from features.errors import InputError
from features.extraction.workers import Actors
from study.cli import cli
from study.engine.cluster import NodeType, autoscaled, check_cluster
from study.engine.launch import _concurrency, most_actors
from study.specs import Cluster, Resources

from .test_docs import check_click

ROOT = Path(__file__).parents[1]
FILES = ("cluster.yaml", "docs/cluster/onprem.yaml")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "cluster.yaml",
            "cluster.yaml: valid; provider aws, up to 8 workers; trials on gpu_worker, up to 64 side by side",
        ),
        ("docs/cluster/onprem.yaml", "valid; provider local, up to 2 workers; trials on local.cluster.node"),
    ],
)
def test_a_shipped_file_is_valid_for_ray(name: str, says: str) -> None:
    assert check_cluster(ROOT / name, Resources()).line.endswith(says)


@pytest.mark.parametrize("name", FILES)
def test_the_head_serves_the_driver_alone(name: str) -> None:
    config = yaml.safe_load((ROOT / name).read_text())
    if "available_node_types" in config:
        assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    else:
        assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_the_image_is_not_the_one_that_ray_names_by_itself() -> None:
    """`latest_dlami` is Ubuntu 18.04 in Ray 2.60, whose Python cannot install this package."""
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"].values()
    assert {node["node_config"]["ImageId"] for node in types} == {"ami-REPLACE_ME"}


def changed(folder: Path, name: str, **changes: Any) -> Path:
    config = yaml.safe_load((ROOT / name).read_text())
    path = folder / Path(name).name
    path.write_text(yaml.safe_dump({key: value for key, value in {**config, **changes}.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("cluster.yaml", {"max_wokers": 8}, r"cluster.yaml: the file: .*'max_wokers' was unexpected.*; see Ray's"),
        ("cluster.yaml", {"max_workers": "8"}, r"cluster.yaml: max_workers: '8' is not of type 'integer'; see Ray's"),
        ("cluster.yaml", {"head_node_type": "boss"}, r"cluster.yaml: Ray refuses it: ValueError: .*head_node_type"),
        ("docs/cluster/onprem.yaml", {"provider": {"type": "local"}}, r"onprem.yaml: Ray refuses it: .*head_ip"),
    ],
)
def test_a_fault_is_one_short_line(name: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as found:
        check_cluster(changed(tmp_path, name, **changes), Resources())
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 400 + len(str(tmp_path))


def test_a_trial_that_no_node_holds_is_refused() -> None:
    with pytest.raises(InputError, match=r"no node type holds a trial of 64 CPU and 0 GPU; it has head .*gpu_worker"):
        check_cluster(ROOT / "cluster.yaml", Resources(cpus=64))
    checked = check_cluster(ROOT / "cluster.yaml", Resources(cpus=1, gpus=0.25))
    assert "trials on gpu_worker, up to 32 side by side, each with 25% of a GPU and of its memory" in checked.line
    assert checked.side_by_side == 32
    assert check_cluster(ROOT / "cluster.yaml", Resources(cpus=3, gpus=1)).side_by_side == 8


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: [")
    with pytest.raises(InputError, match="not readable as YAML"):
        check_cluster(path, Resources())
    path.write_text("- a")
    with pytest.raises(InputError, match="is no mapping"):
        check_cluster(path, Resources())


def there(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float], head: str = "10.0.0.1") -> None:
    """A cluster with these nodes, the first its head; this machine is 10.0.0.1."""
    found = [{"Alive": True, "NodeManagerAddress": head, "Resources": dict(node)} for node in nodes]
    found[0]["Resources"]["node:__internal_head__"] = 1.0  # type: ignore[index]
    monkeypatch.setattr("ray.nodes", lambda: found)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.1")


def left_by_ray_up(home: Path, workers: int, **types: tuple[dict[str, float], int]) -> None:
    """The file of a cluster with a head without cores, and these types of (resources, at most so many)."""
    of = {name: {"resources": resources, "max_workers": count} for name, (resources, count) in types.items()}
    of["boss"] = {"resources": {"CPU": 0}, "max_workers": 0}
    config = {"max_workers": workers, "head_node_type": "boss", "available_node_types": of}
    (home / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def test_the_limit_of_all_workers_takes_no_type_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    there(monkeypatch, {"CPU": 2})
    left_by_ray_up(
        tmp_path, 8, small=({"CPU": 4}, 8), gpu=({"CPU": 4, "GPU": 1}, 3), large=({"CPU": 16}, 2), no=({}, 0)
    )
    here = Cluster(address="auto")
    assert _concurrency(here, Resources(cpus=1, gpus=1)) == 3, "the type is not the first, and can be started"
    assert _concurrency(here, Resources(cpus=2)) == 1 + 2 * 8 + 6 * 2, "the head, both large ones, six others"
    with pytest.raises(InputError, match=r"asks for 1 CPU and 2 GPU, and no node of the cluster has them"):
        _concurrency(here, Resources(cpus=1, gpus=2))


def test_the_file_of_another_cluster_is_not_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    left_by_ray_up(tmp_path, 1, gpu=({"CPU": 2, "GPU": 1}, 1))
    elsewhere = Cluster(address="10.0.0.2:6379")
    there(monkeypatch, {"CPU": 0}, {"CPU": 64}, head="10.0.0.2")
    assert _concurrency(elsewhere, Resources(cpus=1)) is None, "that cluster's limit is not known here"
    with pytest.raises(InputError, match=r"has them; it has nodes of 0 CPU and 0 GPU; 64 CPU and 0 GPU; ask for less$"):
        _concurrency(elsewhere, Resources(cpus=1, gpus=1))
    there(monkeypatch, {"CPU": 0}, {"CPU": 64})
    assert _concurrency(Cluster(address="auto"), Resources(cpus=1)) == 64, (
        "an old file: the nodes that are there hold more"
    )


def test_a_cluster_without_a_worker_yet_may_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ray up cluster.yaml` leaves it: a head that holds no trial, and the file beside it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    there(monkeypatch, {})
    here = Cluster(address="auto")
    assert autoscaled() == ([], 0)
    with pytest.raises(
        InputError, match=r"no node of the cluster has them; it has nodes of 0 CPU and 0 GPU; ask for less$"
    ):
        _concurrency(here, Resources())
    (tmp_path / "ray_bootstrap_config.yaml").write_text((ROOT / "cluster.yaml").read_text())
    assert autoscaled() == ([NodeType({"CPU": 8, "GPU": 1}, 8)], 8)
    assert _concurrency(here, Resources()) == 64
    assert _concurrency(here, Resources(cpus=1, gpus=0.25)) == 32
    assert _concurrency(Cluster(address="auto", max_concurrent=5), Resources()) == 5
    with pytest.raises(
        InputError, match=r"asks for 1 CPU and 2 GPU, .* nodes of 0 CPU and 0 GPU; 8 CPU and 1 GPU; ask for less$"
    ):
        _concurrency(here, Resources(cpus=1, gpus=2))


def test_the_workers_of_an_extraction_are_those_of_the_grown_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    there(monkeypatch, {})
    here = Cluster(address="auto", max_concurrent=2)  # which is of trials
    assert most_actors(here) is None, "nobody tells"
    (tmp_path / "ray_bootstrap_config.yaml").write_text((ROOT / "cluster.yaml").read_text())
    assert most_actors(here) == Actors(8, on_gpu=True)
    left_by_ray_up(tmp_path, 3, large=({"CPU": 16}, 2), small=({"CPU": 4}, 8))
    assert most_actors(here) == Actors(36, on_gpu=False)


def test_nothing_is_refused_where_the_file_leaves_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    there(monkeypatch, {})
    types = {"any": {"resources": {}, "max_workers": 2, "node_config": {}}}
    config = {"max_workers": 2, "head_node_type": "any", "available_node_types": types}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config))
    assert _concurrency(Cluster(address="auto"), Resources(cpus=64)) is None


# --- Kubernetes and Slurm -----------------------------------------------------------------------------------------

# Fields of KubeRay's types RayJobSpec, RayClusterSpec, ... (ray-operator/apis/ray/v1); `!` marks those that must be there.
KUBERAY = {
    "spec": """activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector
        submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources
        entrypointNumCpus
        entrypointNumGpus ttlSecondsAfterFinished shutdownAfterJobFinishes suspend""",
    "spec.rayClusterSpec": """headGroupSpec! workerGroupSpecs rayVersion enableInTreeAutoscaling autoscalerOptions
        headServiceAnnotations suspend""",
    "spec.rayClusterSpec.autoscalerOptions": """resources image imagePullPolicy env envFrom volumeMounts securityContext
        idleTimeoutSeconds upscalingMode""",
    "spec.rayClusterSpec.headGroupSpec": "serviceType headService enableIngress rayStartParams template!",
    "spec.rayClusterSpec.workerGroupSpecs": """groupName! replicas minReplicas! maxReplicas! numOfHosts rayStartParams
        template! scaleStrategy""",
}


def at(document: Any, place: str) -> list[dict[str, Any]]:
    """The mappings at a dotted place; of a list each."""
    for name in place.split("."):
        document = document[name]
    return document if isinstance(document, list) else [document]


def test_the_job_for_kubernetes_has_the_fields_of_kuberay() -> None:
    job = yaml.safe_load((ROOT / "docs/cluster/kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    for place, names in KUBERAY.items():
        fields = {name.rstrip("!") for name in names.split()}
        for mapping in at(job, place):
            assert mapping.keys() <= fields, place
            assert {name[:-1] for name in names.split() if name.endswith("!")} <= mapping.keys(), place
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert "/shared" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert container["resources"]["requests"] == container["resources"]["limits"], "Ray counts the limits"
    assert groups[0]["rayStartParams"]["num-cpus"] == "0"
    assert shlex.split(job["spec"]["entrypoint"])[-2:] == ["--home", "/shared/runs"]
    check_click(cli, shlex.split(job["spec"]["entrypoint"])[1:])


def test_the_batch_script_for_slurm_starts_the_study_on_all_nodes(tmp_path: Path) -> None:
    """With stand-ins that print their words: `srun` for Slurm, which is not there."""
    stand_ins = {
        "scontrol": 'test "$*" = "show hostnames node[7-8]" && printf "node7\\nnode8\\n"',
        "srun": 'printf "%s\\n" "$@"; echo "token ${#RAY_AUTH_TOKEN} $RAY_AUTH_MODE $RAY_TMPDIR"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "20017", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8", "SLURM_SUBMIT_DIR": "/work/a b",
    }  # fmt: skip
    script = ["bash", str(ROOT / "docs/cluster/slurm.sh"), "my plan.yaml", "--max-concurrent", "3"]
    ran = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    made, words = (part.splitlines() for part in ran.stdout.split("token 64 token /tmp/ray-20017\n")[:2])
    assert made == ["--kill-on-bad-exit=1", "mkdir", "-p", "/tmp/ray-20017"]
    assert words[:11] == [
        "--kill-on-bad-exit=1", "ray", "symmetric-run", "--address", "node7:20017", "--min-nodes", "2", "--num-cpus=8",
        "--num-gpus=0", "--", "study",
    ]  # fmt: skip
    assert words[11:] == [
        "run",
        "my plan.yaml",
        "--address",
        "auto",
        "--home",
        "/work/a b/runs",
        "--max-concurrent",
        "3",
    ]
    check_click(cli, words[11:])
