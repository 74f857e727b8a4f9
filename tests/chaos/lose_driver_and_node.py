"""A cluster of its own, in this process: kill a driver amid its work, then a node amid that of the next one.

Run as ``python -m tests.chaos.lose_driver_and_node SOURCE CORPUS FOLDER``; ``told.json`` there says what happened.
"""

import functools
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

import pipeline.shard
from pipeline.storage import Storage
from tests.chaos.conftest import finish, settings
from tests.chaos.mortal_work import WatchedWork
from tests.chaos.processes import start


@dataclass(frozen=True)
class Watched:
    """Makes the process it is called in a driver whose units are watched."""

    attempts: str

    def __call__(self) -> None:
        vars(pipeline.shard)["ShardWork"] = functools.partial(WatchedWork, attempts=self.attempts)


def wait_for_records(corpus: Storage, count: int) -> None:
    while len(corpus.list("_commits")) < count:
        time.sleep(0.02)


def wait_for_attempt(folder: Path, node: str) -> None:
    """Until the node begins another unit: it will not have ended it a moment later."""
    before = set(folder.glob(f"*-{node}-*"))
    while set(folder.glob(f"*-{node}-*")) == before:
        time.sleep(0.02)


def main(source: str, corpus_url: str, folder: str) -> None:
    """The two deaths, then the end of the run."""
    corpus, attempts = Storage.open(corpus_url), Path(folder) / "attempts"
    attempts.mkdir()
    watched = Watched(str(attempts))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    lost, _ = (cluster.add_node(num_cpus=1) for _ in range(2))
    address = {"RAY_ADDRESS": cluster.address}
    driver = start(
        pipeline.shard.shard,
        settings(source, corpus, unit_samples=1, workers=1),
        Path(folder) / "driver",
        prelude=watched,
        environment=address,
    )
    wait_for_records(corpus, 2)
    driver.process.kill()
    code, committed = driver.end(), len(corpus.list("_commits"))

    def lose_node() -> None:
        wait_for_records(corpus, committed + 1)
        wait_for_attempt(attempts, lost.node_id)
        cluster.remove_node(lost, allow_graceful=False)

    watched()
    os.environ.update(address)
    ray.init(address=cluster.address, log_to_driver=False)
    killer = threading.Thread(target=lose_node)
    killer.start()
    result = finish(source, corpus, unit_samples=1, workers=1)
    killer.join()
    nodes = {path.name: path.name.split("-")[:2] for path in attempts.iterdir()}
    again = {ordinal for ordinal, node in nodes.values() if node == lost.node_id} & {
        ordinal for ordinal, node in nodes.values() if node != lost.node_id
    }
    alive = sum(node["Alive"] for node in ray.nodes())
    told = {"code": code, "committed": committed, "alive": alive, "again": len(again), "units": result.units}
    (Path(folder) / "told.json").write_text(json.dumps(told))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
