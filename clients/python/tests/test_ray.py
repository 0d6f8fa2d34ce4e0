"""A fleet on a local Ray cluster of several nodes: `make client-ray`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_server import FILES, PROMPTS, Server

ray = pytest.importorskip("ray", reason="ray is not installed; `make client-ray` has it")

from ray.cluster_utils import Cluster  # noqa: E402

import spatialscore_client as sc  # noqa: E402
from spatialscore_client.ray import Fleet, FleetClient  # noqa: E402

REPLICAS = 3
RANKS = 3
# What a rank asks for before the first fault, and what is asked for after the last one.
GROUPS = 2
STORE = 80 << 20
# A worker that dies is seen in seconds, not minutes.
SYSTEM = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_timeout_ms": 2000}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "resources": {"head": 100}, "object_store_memory": STORE,
                        "_system_config": SYSTEM},
    )  # fmt: skip
    for _ in range(REPLICAS):
        made.add_node(num_cpus=1, object_store_memory=STORE)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def right() -> list[float]:
    """The scores of a server that is no fleet's."""
    with Server() as server, sc.SpatialScoreClient(server.address, timeout=300) as client:
        return list(client.score(PROMPTS, FILES).means)


def fleet(**options: Any) -> Fleet:
    options = {"settings": {"cache.max_items": 0, "model.threads": 1}, **options}
    return Fleet(**{"replicas": REPLICAS, "command": os.environ["SPATIALSCORE_BINARY"], **options})


def listens(target: str) -> bool:
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 2).close()
    except OSError:
        return False
    return True


def until(true: Callable[[], bool], seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.25)


@ray.remote(num_cpus=0, resources={"head": 0.01})
class Progress:
    """How many groups have been scored, and whether to go on."""

    def __init__(self) -> None:
        self.scored, self.go_on = 0, True

    def add(self) -> bool:
        self.scored += 1
        return self.go_on

    def count(self) -> int:
        return self.scored

    def stop(self) -> None:
        self.go_on = False


@ray.remote(num_cpus=0, resources={"head": 0.01}, max_retries=0)
def rank(client: FleetClient, progress: Any) -> list[list[float]]:
    """Scores group after group, as a rank of a training job does."""
    answers = []
    while True:
        answers.append(list(client.score(PROMPTS, FILES, timeout=120).means))
        if not ray.get(progress.add.remote()):
            return answers


def test_a_node_and_a_replica_that_die_in_the_middle_of_groups_cost_no_answer(
    cluster: Cluster, right: list[float]
) -> None:
    with fleet() as servers:
        servers.wait()
        client = servers.client()
        before = {each.index: each.target for each in servers.replicas()}
        assert len(set(before.values())) == REPLICAS and all(map(listens, before.values()))
        progress = Progress.remote()
        ranks = [rank.remote(client, progress) for _ in range(RANKS)]

        def more() -> None:
            wanted = ray.get(progress.count.remote()) + GROUPS * RANKS
            until(lambda: ray.get(progress.count.remote()) >= wanted)

        more()
        # A machine is gone, and its replica with it; another one joins, and takes it.
        here = ray.get_runtime_context().get_node_id()
        gone = next(node for node in cluster.worker_nodes if node.node_id != here)
        cluster.remove_node(gone, allow_graceful=False)
        more()
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
        # One replica after the other dies where it stands and comes back on another port, until none is where it was.
        for index, actor in enumerate(servers._actors):
            until(lambda: not any(each.fault for each in servers.replicas()))
            ray.kill(actor, no_restart=False)
            until(lambda index=index: servers.replicas()[index].target not in ("", before[index]))
        more()
        ray.get(progress.stop.remote())
        answers = [answer for each in ray.get(ranks, timeout=300) for answer in each]
        assert len(answers) == ray.get(progress.count.remote()) >= 3 * GROUPS * RANKS
        assert all(answer == [pytest.approx(mean, abs=1e-4) for mean in right] for answer in answers)

        now = servers.replicas()
        assert not {each.target for each in now} & set(before.values())
        # Who scores is told the new places.
        until(lambda: set(client._known.values()) == {each.target for each in servers.replicas()}, 30)
        client.score(PROMPTS, FILES)
        until(lambda: all(each.model.startswith("spatialscore-mini sha256:") for each in servers.replicas()), 30)
        assert sum(each.pictures_per_second for each in servers.replicas()) > 0
        client.close()
        targets = [each.target for each in now]
    until(lambda: not any(map(listens, targets)), 30)


def test_only_its_own_clients_are_let_in(cluster: Cluster) -> None:
    with fleet(replicas=1) as servers:
        servers.wait()
        (replica,) = servers.replicas()
        with pytest.raises(sc.AuthenticationError):
            sc.SpatialScoreClient(replica.target, timeout=10).model()


def test_why_none_serves_is_said(cluster: Cluster) -> None:
    with fleet(replicas=1, checkpoint="/nowhere/at/all") as servers:
        with pytest.raises(sc.UnavailableError, match="no checkpoint .*/nowhere/at/all"):
            servers.wait(10)
        with pytest.raises(sc.UnavailableError, match="no replica of the fleet serves"):
            servers.client(wait=1)


def test_it_ends_with_the_job(cluster: Cluster) -> None:
    """Also where that does not end it."""
    script = (
        "import os, ray, sys; from spatialscore_client.ray import Fleet;"
        "ray.init(address=sys.argv[1], log_to_driver=False);"
        "fleet = Fleet(replicas=2, command=os.environ['SPATIALSCORE_BINARY']); fleet.wait();"
        "print(*[each.target for each in fleet.replicas()], flush=True); os._exit(1)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, cluster.address], capture_output=True, text=True, timeout=300
    )
    targets = ended.stdout.split()
    assert len(targets) == 2, ended.stderr
    until(lambda: not any(map(listens, targets)), 60)
