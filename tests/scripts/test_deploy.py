"""What `deploy/` holds for operators fits the server: flags, routes, times, names of metrics."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moespan.cli import _parser
from moespan.config import EngineConfig
from moespan.serve.metrics import Metrics
from moespan.serve.options import LifeOptions

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))

CLOSE_S = 12  # most seconds that the ranks take to end
PROBES = {"startupProbe": "/health", "livenessProbe": "/live", "readinessProbe": "/ready"}
KINDS = {
    "Service": ("v1", {"selector", "ports"}),
    "Deployment": ("apps/v1", {"replicas", "selector", "strategy", "template"}),
    "LeaderWorkerSet": (
        "leaderworkerset.x-k8s.io/v1",
        {"replicas", "startupPolicy", "leaderWorkerTemplate"},
    ),
}
"""Kind of an object → its version, and the fields of its `spec` that we use and that it has."""


def documents(path: Path) -> list[dict[str, Any]]:
    found = list(yaml.safe_load_all(path.read_text()))
    assert found and all(isinstance(one, dict) for one in found)
    return found


def pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The templates of pods, the one that serves first."""
    if document["kind"] == "Deployment":
        yield document["spec"]["template"]
    if document["kind"] == "LeaderWorkerSet":
        group = document["spec"]["leaderWorkerTemplate"]
        assert set(group) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
        yield from (group["leaderTemplate"], group["workerTemplate"])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_objects_have_what_their_kind_needs(path: Path):
    labels: list[dict[str, str]] = []
    for document in documents(path):
        version, fields = KINDS[document["kind"]]
        assert document["apiVersion"] == version and document["metadata"]["name"] == "moespan"
        assert set(document["spec"]) <= fields
        labels += [pod["metadata"]["labels"] for pod in pods(document)]
    (service, workload) = documents(path)
    selector = service["spec"]["selector"]
    assert [selector.items() <= one.items() for one in labels] == [True, *[False] * len(labels[1:])]
    if workload["kind"] == "Deployment":
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels[0].items()


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_pods_run_commands_that_exist_and_mount_what_they_declare(path: Path):
    for document in documents(path):
        for pod in pods(document):
            spec = pod["spec"]
            (container,) = spec["containers"]
            args = _parser().parse_args(container["args"])
            assert args.verb == "serve" and args.model == "/model" and args.port == 8000
            mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert list(mounted) == [volume["name"] for volume in spec["volumes"]]
            assert mounted["model"] == "/model" and mounted["shm"] == "/dev/shm"
            names = {one["name"] for one in container["env"]}
            assert "MOESPAN_API_KEY" in names and (
                "MOESPAN_CLUSTER_KEY" in names or document["kind"] == "Deployment"
            )
            assert all("secretKeyRef" in one["valueFrom"] for one in container["env"])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_probes_and_times_fit_the_server(path: Path):
    drain_s = LifeOptions().drain_timeout_s
    for document in documents(path):
        for pod, serves in zip(pods(document), (True, False), strict=False):
            spec = pod["spec"]
            (container,) = spec["containers"]
            pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
            ports = [port["name"] for port in container.get("ports", [])]
            if not serves:  # it stays until node 0 has drained
                assert (
                    15 + drain_s <= pause_s and not ports and not PROBES.keys() & container.keys()
                )
                assert spec["terminationGracePeriodSeconds"] > pause_s + CLOSE_S
                continue
            assert spec["terminationGracePeriodSeconds"] > pause_s + drain_s + CLOSE_S
            for probe, route in PROBES.items():
                assert container[probe]["httpGet"] == {"path": route, "port": "http"}
            assert ports == ["http"]
            startup = container["startupProbe"]
            assert startup["periodSeconds"] * startup["failureThreshold"] == 30 * 60


def test_the_unit_of_systemd_fits_the_server():
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "moespan.service")
    service = unit["Service"]
    assert service["Type"] == "notify" and service["KillMode"] == "mixed"
    assert service["Restart"] == "on-failure"
    assert int(service["TimeoutStopSec"]) > LifeOptions().drain_timeout_s + CLOSE_S
    assert int(service["WatchdogSec"]) > 10
    program, *arguments = shlex.split(service["ExecStart"])
    assert Path(program).name == "moespan" and _parser().parse_args(arguments).verb == "serve"
    assert "HUP" not in service.get("ExecReload", "") or "--api-key-file" in arguments


# Prometheus and Grafana.


def expressions() -> dict[str, str]:
    """Name of an alert or a panel → its queries."""
    (group,) = yaml.safe_load((DEPLOY / "monitoring" / "alerts.yaml").read_text())["groups"]
    found = {rule["alert"]: rule["expr"] for rule in group["rules"]}
    board = json.loads((DEPLOY / "monitoring" / "grafana.json").read_text())
    for panel in board["panels"]:
        found[panel["title"]] = " ".join(target["expr"] for target in panel["targets"])
    for variable in board["templating"]["list"][1:]:
        found[variable["name"]] = variable["query"]
    return found


def test_alerts_and_panels_ask_for_metrics_that_exist():
    metrics = Metrics("fake", EngineConfig("fake"))
    text = metrics.render().decode()
    names = set(re.findall(r"^(?:# TYPE )?(moespan_\w+)", text, re.MULTILINE))
    names |= {f"{name}_bucket" for name in re.findall(r"# TYPE (\w+) histogram", text)}
    wrong = {
        where: sorted(missing)
        for where, query in expressions().items()
        if (missing := set(re.findall(r"moespan_\w+", query)) - names)
    }
    assert not wrong
    assert all("moespan_" in query for query in expressions().values())


def test_alerts_say_what_they_are():
    (group,) = yaml.safe_load((DEPLOY / "monitoring" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["expr"].count("(") == rule["expr"].count(")")
    page = (DEPLOY.parent / "docs" / "operations.md").read_text()
    assert not [rule["alert"] for rule in group["rules"] if rule["alert"] not in page]


def test_the_board_can_be_imported():
    board = json.loads((DEPLOY / "monitoring" / "grafana.json").read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len(expressions()) - 9 - 2
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
