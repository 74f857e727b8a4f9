"""A small sealed corpus with labels and a view, made by the real shard job and the real table writers."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.corpus import Corpus, to_parquet
from pipeline.documents import publish_table
from pipeline.layout import (
    SAMPLE_REFERENCE,
    SAMPLE_SOURCE,
    label_schema,
    labels_index_path,
    labels_path,
    to_json,
    view_path,
)
from pipeline.shard import ShardConfig, shard
from pipeline.view import View, read_view, view_digest

METRICS = ("sharp", "clean")


@dataclass(frozen=True)
class LabelledCorpus:
    """Where it is, and its view ``small``."""

    corpus: Corpus
    view: View

    @property
    def url(self) -> str:
        return self.corpus.storage.url

    def picture(self, relpath: str) -> Path:
        """The file that a sample was."""
        return Path(self.corpus.manifest().facts["generations"][0]["input"]) / relpath


MakeCorpus = Callable[..., LabelledCorpus]


@pytest.fixture(scope="session")
def labelled_corpus(tmp_path_factory: pytest.TempPathFactory) -> MakeCorpus:
    """Make a corpus from ``sides`` drawn pictures, the last ``held_back`` of them in val."""

    def make(sides: tuple[int, ...] = (32,) * 12, held_back: int = 4, seed: int = 0) -> LabelledCorpus:
        folder = tmp_path_factory.mktemp("labelled")
        source = folder / "pictures"
        source.mkdir()
        for number, side in enumerate(sides):
            Image.fromarray(_picture(seed + number, side)).save(source / f"{number:02d}.png")
        (source / "cut.png").write_bytes((source / "00.png").read_bytes()[:200])
        (source / "no <picture>.png").write_bytes(b"text")
        url = str(folder / "corpus")
        shard(ShardConfig(input=str(source), corpus=url, min_side=8, workers=0))
        corpus = Corpus(url)
        rows = corpus.samples([*SAMPLE_REFERENCE.names, *SAMPLE_SOURCE.names])
        labels = _labels(corpus, rows["key"].to_pylist())
        _write_view(corpus, rows, labels, held_back)
        return LabelledCorpus(corpus, read_view(corpus, "small"))

    return make


def _picture(seed: int, side: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    noise = random.normal(0, 12, (side, side, 3))
    ramp = np.linspace(0, 255, side)[:, None, None] * random.uniform(0.3, 1, 3)
    picture = ramp + noise
    picture[side // 4 : side // 2, side // 4 : side // 2] = random.uniform(0, 255, 3)
    return picture.clip(0, 255).astype(np.uint8)


def _labels(corpus: Corpus, keys: list[str]) -> pa.Table:
    random = np.random.default_rng(7)
    calibrated = random.uniform(0, 1, (2, len(keys))).astype(np.float32)
    columns: dict[str, object] = {"key": keys}
    for name, values in zip(METRICS, calibrated, strict=True):
        columns |= {
            f"iqa_{name}": values * 100,
            f"iqa_{name}_cal": values,
            f"iqa_{name}_status": ["success"] * len(keys),
        }
    quality = calibrated.mean(axis=0)
    columns |= {
        "quality": quality,
        "quality_std": calibrated.std(axis=0),
        "quality_bin": (quality * 10).astype(np.int32),
        "hq_plus": quality > 0.7,
    }
    table = pa.table(columns).cast(label_schema(METRICS))
    reference = publish_table(corpus.storage, table, lambda sha256: labels_path("plain", 0, sha256))
    index = {
        "name": "plain",
        "metrics": dict.fromkeys(METRICS, "0123456789ab"),
        "calibration": "plain",
        "hq_threshold": 0.5,
        "objects": [dataclasses.asdict(reference)],
    }
    corpus.storage.publish(labels_index_path("plain"), to_json(index))
    return table


def _write_view(corpus: Corpus, rows: pa.Table, labels: pa.Table, held_back: int) -> None:
    count = rows.num_rows
    split = ["train"] * (count - held_back) + ["val"] * held_back
    table = rows.join(labels, "key").sort_by("key").append_column("split", pa.array(split))
    data = to_parquet(table)
    facts = {
        "name": "small",
        "version": 1,
        "where": "quality > 0 and key <> '<script>alert(1)</script>'",
        "labels": "plain",
        "calibration": "plain",
        "hq_threshold": 0.5,
        "manifest": corpus.manifest().digest,
        "samples": count,
        "train": count - held_back,
        "val": held_back,
        "digest": view_digest(data),
    }
    corpus.storage.publish(view_path("small", 1), data)
    corpus.storage.publish("views/small/v0001.json", to_json(facts))
