"""launch/kubernetes/jobset.yaml: Kubernetes knows all of its keys, and its pods train and end as it expects."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import signal
from pathlib import Path
from typing import Any

import hosts
import pytest
import yaml
from conftest import REPOSITORY, metrics, write_recipe
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from ranks import wait_for
from test_docker import DOCKER, ENTRYPOINT, PATH, assert_saved, environment_of
from test_launch import ON_HOSTS, skip_if

from fullft.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_GATE, EXIT_REQUEUE
from fullft.recipe import Checkpoint

JOBSET = yaml.safe_load((REPOSITORY / "launch" / "kubernetes" / "jobset.yaml").read_text())
NAME = JOBSET["metadata"]["name"]
(NODES,) = JOBSET["spec"]["replicatedJobs"]
JOB = NODES["template"]["spec"]
POD = JOB["template"]["spec"]
(TRAIN,) = POD["containers"]


def is_known(manifest: dict[str, Any]) -> bool:
    """Whether nothing is lost of it in the models that are generated from the OpenAPI of JobSet and Kubernetes."""
    found: dict[str, Any] = JobsetV1alpha2JobSet.from_dict(manifest).to_dict()  # ValueError where a type is wrong
    return found == manifest


def test_kubernetes_knows_all_of_its_keys() -> None:
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert is_known(JOBSET)
    misspelt = copy.deepcopy(JOBSET)
    pod = misspelt["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["terminationGracePeriod"] = pod.pop("terminationGracePeriodSeconds")
    assert not is_known(misspelt)
    misspelt["spec"]["failurePolicy"]["maxRestarts"] = "three"
    with pytest.raises(ValueError, match="maxRestarts"):
        is_known(misspelt)


def test_its_names_and_numbers_fit_together() -> None:
    variables = {one["name"]: one.get("value") for one in TRAIN["env"]}
    assert variables["MASTER_ADDR"] == f"{NAME}-{NODES['name']}-0-0.{NAME}"  # pod 0 of job 0, in JobSet's service
    assert NODES["replicas"] == 1
    assert JOB["completions"] == JOB["parallelism"] == int(variables["NNODES"])
    assert {mount["name"] for mount in TRAIN["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    (grace,) = re.findall(r"FULLFT_GRACE_SECONDS:-(\d+)", Path(ENTRYPOINT).read_text())
    assert Checkpoint().grace_seconds < int(grace) < POD["terminationGracePeriodSeconds"]
    (user,) = re.findall(r"^USER (\d+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert set(POD["securityContext"].values()) == {int(user)}


def answer(code: int | None) -> str:
    """What JobSet does when a pod ends with this code (None: it was evicted and could not), by reason and message that
    Kubernetes gives a failed job."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for rule in JOB["podFailurePolicy"]["rules"]:
        assert rule["action"] == "FailJob"
        if code in rule.get("onExitCodes", {}).get("values", []):
            reason, message = "PodFailurePolicy", f"Container train for pod x failed with exit code {code} matching"
        if code is None and rule.get("onPodConditions") == [{"type": "DisruptionTarget", "status": "True"}]:
            reason, message = "PodFailurePolicy", "Pod x has condition DisruptionTarget matching"
    for rule in JOBSET["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return str(rule["action"])
    return "RestartJobSet"


def test_a_run_is_started_again_where_that_helps() -> None:
    assert answer(EXIT_REQUEUE) == answer(None) == "RestartJobSetAndIgnoreMaxRestarts"
    assert answer(EXIT_FAILED) == answer(137) == "RestartJobSet"  # maxRestarts times
    assert answer(EXIT_BAD_INPUT) == answer(EXIT_GATE) == "FailJobSet"
    assert JOB["backoffLimit"] == 0
    assert POD["restartPolicy"] == "Never"


def environment(index: int, workspace: Path) -> dict[str, str]:
    """Of the pod with this completion index."""
    fields = {"metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index)}
    given = {
        one["name"]: one["value"] if "value" in one else fields[one["valueFrom"]["fieldRef"]["fieldPath"]]
        for one in TRAIN["env"]
    }
    return {name: value.replace("/workspace", str(workspace)) for name, value in given.items()}


@pytest.mark.cluster
def test_its_pods_train_together_and_all_save_when_one_is_evicted(recipe: dict[str, Any], tmp_path: Path) -> None:
    skip_if(hosts.unavailable())
    recipe["train"]["steps"] = recipe["checkpoint"]["every_steps"] = 100_000
    write_recipe(recipe, tmp_path / "recipe.yaml")
    with hosts.Network(tmp_path / "hosts", ["n0", "n1"]) as network, contextlib.ExitStack() as stack:
        with (tmp_path / "hosts" / "hosts").open("a") as names:
            names.write(f"{network.addresses['n0']} {NAME}-{NODES['name']}-0-0.{NAME}\n")
        log = stack.enter_context((tmp_path / "pods.log").open("w"))
        pods = [
            network[f"n{index}"].popen(
                ENTRYPOINT, *TRAIN["args"], cwd=tmp_path, stdout=log, stderr=log,
                env=os.environ | ON_HOSTS | {"PATH": PATH, "GPUS_PER_NODE": "1"} | environment(index, tmp_path),
            )
            for index in range(JOB["completions"])
        ]  # fmt: skip
        file = Path(recipe["run_dir"]) / "metrics.jsonl"
        wait_for(lambda: file.exists() and len(metrics(recipe)) > 3, "steps")
        pods[1].send_signal(signal.SIGTERM)
        assert [pod.wait(120) for pod in pods] == [EXIT_REQUEUE] * 2, Path(log.name).read_text()[-6000:]
    assert_saved(recipe)
    assert environment_of(recipe)["ranks_of_host"] == {"n0": 1, "n1": 1}
