"""The manifests of deploy/: valid, and what they say of each other and of the server is so."""

from __future__ import annotations

import os
import re
import urllib.request
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

from spatialscore_client import SpatialScoreClient

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

RESOURCES = list(yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text()))
SCALED = yaml.safe_load((ROOT / "deploy/keda.yaml").read_text())
SERVER = tomllib.loads((ROOT / "spatialscore.example.toml").read_text())["server"]
# Releases that are maintained or nearly so.
VERSIONS = ["1.30", kubernetes_validate.latest_version()]


def of_kind(kind: str) -> Any:
    (found,) = (each for each in RESOURCES if each["kind"] == kind)
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource["kind"])
def test_each_is_what_kubernetes_takes(resource: Any, version: str) -> None:
    kubernetes_validate.validate(resource, version, strict=True)


def test_the_kinds_that_a_fleet_needs_are_there() -> None:
    assert {each["kind"] for each in RESOURCES} == {"Service", "Deployment", "PodDisruptionBudget"}
    # Without an address of its own: clients balance over the pods.
    assert of_kind("Service")["spec"]["clusterIP"] == "None"


def test_they_speak_of_the_same_pods() -> None:
    deployment = of_kind("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert of_kind("Service")["spec"]["selector"].items() <= labels.items()
    assert of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert SCALED["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in of_kind("Service")["spec"]["ports"]} <= ports


def test_what_is_accepted_is_answered_before_a_pod_is_killed() -> None:
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    grace = float(variables["SPATIALSCORE__SERVER__DRAIN_GRACE_SECONDS"])
    drain = float(variables.get("SPATIALSCORE__SERVER__DRAIN_TIMEOUT_SECONDS", SERVER["drain_timeout_seconds"]))
    assert pod["terminationGracePeriodSeconds"] > grace + drain
    # Readiness is asked at least once before calls are refused.
    assert grace > container["readinessProbe"]["periodSeconds"]
    # Every variable is a setting of the server.
    settings = tomllib.loads((ROOT / "spatialscore.example.toml").read_text())
    for name in variables:
        _, section, key = name.lower().split("__")
        assert key in settings[section]


def test_the_fleet_grows_by_metrics_that_there_are() -> None:
    """By the wait itself, whatever the number of replicas."""
    (trigger,) = SCALED["spec"]["triggers"]
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "Value")
    assert float(trigger["metadata"]["threshold"]) > 0
    if "SPATIALSCORE_METRICS" not in os.environ:
        pytest.skip("no real server; run this by scripts/with_server.sh, as `make client-test` does")
    # A metric is there once something was measured.
    with SpatialScoreClient(os.environ["SPATIALSCORE_ADDRESS"], timeout=60) as client:
        client.score("a panda", [str(ROOT / "samples/panda.right.png")])
    page = urllib.request.urlopen(os.environ["SPATIALSCORE_METRICS"], timeout=30).read().decode()
    known = set(re.findall(r"^# TYPE (\S+) ", page, flags=re.M))
    named = set(re.findall(r"spatialscore_\w+", trigger["metadata"]["query"]))
    assert named and {re.sub("_(sum|count)$", "", name) for name in named} <= known
