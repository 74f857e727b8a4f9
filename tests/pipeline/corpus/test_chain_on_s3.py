"""Pictures, corpus and runs in a bucket: the same chain, through the same calls."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from iqpir.training import checkpoint
from iqpir.training.checkpoint import MANIFEST
from pipeline.encode import EncodeConfig, encode
from pipeline.evaluate import EvaluateConfig, evaluate
from pipeline.stage1 import train_stage1
from pipeline.stage2 import train_stage2
from pipeline.storage import Storage
from pipeline.training.checkpoints import fetch_checkpoint
from pipeline.training.feed import FeedConfig
from tests.chain import HERE, Chain, make_data, write_pictures
from tests.pipeline.training_job import Job


def checkpoints(runs: Storage, name: str) -> list[str]:
    return [entry.path.split("/")[2] for entry in runs.list(f"{name}/checkpoints") if entry.path.endswith(MANIFEST)]


@pytest.mark.slow
def test_the_chain_runs_in_a_bucket(chain: Chain, s3: Any, tmp_path: Path) -> None:
    bucket = Storage.open("s3://pictures/whole-chain")
    for path in write_pictures(tmp_path / "pictures", 16).iterdir():
        bucket.publish(f"input/{path.name}", path)
    runs = bucket.child("runs")
    data = make_data(f"{bucket.url}/input", f"{bucket.url}/corpus", runs.url, chain.data.tracking_uri)
    feed = FeedConfig(cache=str(tmp_path / "shards"))

    first = data.stage1("s3-stage1", steps=2, checkpoint_every=1, feed=feed)
    trained = train_stage1(first)
    assert (trained.status, trained.step) == ("done", 2)
    assert checkpoints(runs, "s3-stage1") == ["step_00000001-a1", "step_00000002-a1"]
    assert any((tmp_path / "shards").rglob("*.tar"))
    assert train_stage1(first).status == "done earlier"

    # As if the last upload had been cut off: its payload is there, its manifest is not.
    runs.remove(f"s3-stage1/checkpoints/step_00000002-a1/{MANIFEST}")
    # A Ray of its own goes on, whose workers have the server in their environment.
    job = Job(dataclasses.replace(first, launcher="ray"), tmp_path)
    again = job.finish(job.start(), 0)
    assert (again["status"], again["resumed_from"]) == ("done", 1)
    assert checkpoints(runs, "s3-stage1") == ["step_00000001-a1", "step_00000002-a2"]
    ours = checkpoint.load(fetch_checkpoint(again["run"]))
    local = train_stage1(chain.data.stage1("s3-local", steps=2))
    theirs = checkpoint.load(Path(local.checkpoint))
    assert ours.metadata["weights_digest"] == theirs.metadata["weights_digest"]

    encode(EncodeConfig(corpus=data.corpus, stage1=again["run"], scheduling=HERE))
    second = train_stage2(data.stage2("s3-stage2", again["run"], steps=1, checkpoint_every=1, feed=feed))
    settings = EvaluateConfig(
        corpus=data.corpus,
        view=data.view,
        checkpoint=second.run,
        samples=2,
        dial=(0.1, 0.5, 0.9),
        tracking_uri=chain.data.tracking_uri,
    )
    result = evaluate(settings)
    assert result.output == f"{runs.url}/s3-stage2/evaluation"
    written = json.loads(runs.read("s3-stage2/evaluation/evaluation.json"))
    assert written["quality"] == result.quality
    assert evaluate(dataclasses.replace(settings)) == result
