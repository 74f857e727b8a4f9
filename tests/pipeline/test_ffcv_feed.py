"""The .beton feed gives the batches that the indexed feed gives, and refuses what is not its own."""

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ffcv", reason="ffcv (extra `export`, needs Debian's libopencv-dev) is not installed")

from iqpir.config import preset
from iqpir.degradation.parameters import PRESETS
from iqpir.errors import UsageError, VerificationError
from iqpir.stages.batch import Batch
from pipeline.export import ExportConfig, export
from pipeline.training.feed import FeedConfig, IndexedFeed, Samples
from pipeline.training.ffcv_feed import FfcvFeed

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def samples_of(made: Any, fit: str = "exact", degrade: bool = True, seed: int = 5) -> Samples:
    return Samples(
        made.url,
        made.view.split("train"),
        FeedConfig(fit=fit),  # type: ignore[arg-type]
        preset("tiny32"),
        PRESETS["tiny32"] if degrade else None,
        None,
        seed,
    )


def exported(made: Any, path: Path, fit: str = "exact", mode: str = "raw") -> Path:
    config = ExportConfig(
        corpus=made.url,
        view="small",
        output=str(path),
        size=32,
        fit=fit,
        mode=mode,
        workers=2,  # type: ignore[arg-type]
    )
    assert export(config).written
    return path


@pytest.fixture(scope="module")
def raw(labelled_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A corpus of 32x32 pictures and its raw .beton."""
    made = labelled_corpus()
    return made, exported(made, tmp_path_factory.mktemp("raw") / "train.beton")


def copied(raw: tuple[Any, Path], folder: Path) -> tuple[Any, Path]:
    """The same, in a folder where it may be damaged."""
    made, beton = raw
    for name in (beton.name, f"{beton.name}.json"):
        shutil.copy(beton.with_name(name), folder)
    return made, folder / beton.name


def equal(first: Batch, second: Batch) -> bool:
    names = ("hq", "lq", "quality", "index", "flipped")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


def test_raw_betons_give_the_very_batches_of_the_indexed_feed(raw: tuple[Any, Path]) -> None:
    made, beton = raw
    samples = samples_of(made)
    for rank in (0, 1):
        for seen in (0, 12):
            indexed = IndexedFeed(samples, 4, rank, 2, CPU)
            ours = FfcvFeed(beton, made.view.digest, samples, 4, rank, 2, CPU)
            pairs = list(islice(zip(indexed.batches(seen), ours.batches(seen), strict=False), 7))
            assert len(pairs) == 7
            assert all(equal(first, second) for first, second in pairs)
    other = FfcvFeed(beton, made.view.digest, samples_of(made, seed=6), 4, 0, 2, CPU)
    assert not equal(pairs[0][0], next(other.batches(0)))


def test_resized_pictures_too(labelled_corpus: Any, tmp_path: Path) -> None:
    made = labelled_corpus(sides=(40, 64, 33, 47), held_back=1)
    beton = exported(made, tmp_path / "train.beton", "resize")
    samples = samples_of(made, "resize")
    indexed = IndexedFeed(samples, 3, 0, 1, CPU).batches(0)
    ours = FfcvFeed(beton, made.view.digest, samples, 3, 0, 1, CPU).batches(0)
    assert all(equal(first, second) for first, second in islice(zip(indexed, ours, strict=False), 3))


def test_loader_processes_give_the_same_batches(raw: tuple[Any, Path]) -> None:
    made, beton = raw
    rows = made.view.split("train")
    feed = FeedConfig(workers=1)
    spread = Samples(made.url, rows, feed, preset("tiny32"), PRESETS["tiny32"], None, 5)
    theirs = IndexedFeed(samples_of(made), 4, 0, 1, CPU).batches(0)
    ours = FfcvFeed(beton, made.view.digest, spread, 4, 0, 1, CPU).batches(0)
    assert all(equal(first, second) for first, second in islice(zip(theirs, ours, strict=False), 3))


def test_jpeg_betons_resemble_the_pictures(labelled_corpus: Any, tmp_path: Path) -> None:
    made = labelled_corpus()
    beton = exported(made, tmp_path / "train.beton", mode="jpg")
    samples = samples_of(made, degrade=False)
    theirs = next(IndexedFeed(samples, 8, 0, 1, CPU).batches(0))
    ours = next(FfcvFeed(beton, made.view.digest, samples, 8, 0, 1, CPU).batches(0))
    assert torch.equal(ours.index, theirs.index)
    assert 0 < (ours.hq - theirs.hq).abs().mean() < 0.12


@pytest.mark.parametrize(
    ("field", "value"),
    [("view_digest", "0" * 32), ("split", "val"), ("image_size", 64), ("fit", "resize"), ("pixels", "other")],
)
def test_betons_of_another_training_are_refused(
    raw: tuple[Any, Path], tmp_path: Path, field: str, value: object
) -> None:
    made, beton = copied(raw, tmp_path)
    sidecar = tmp_path / "train.beton.json"
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), field: value}))
    with pytest.raises(UsageError, match=field):
        FfcvFeed(beton, made.view.digest, samples_of(made), 4, 0, 1, CPU)


def test_a_view_that_changed_is_refused(raw: tuple[Any, Path]) -> None:
    made, beton = raw
    with pytest.raises(UsageError, match="view_digest"):
        FfcvFeed(beton, "f" * 32, samples_of(made), 4, 0, 1, CPU)


def test_one_flipped_byte_is_found(raw: tuple[Any, Path], tmp_path: Path) -> None:
    made, beton = copied(raw, tmp_path)
    data = bytearray(beton.read_bytes())
    data[len(data) // 2] ^= 1
    beton.write_bytes(data)
    with pytest.raises(VerificationError, match="sha256"):
        FfcvFeed(beton, made.view.digest, samples_of(made), 4, 0, 1, CPU)


def test_a_beton_without_its_sidecar_is_unfinished(raw: tuple[Any, Path], tmp_path: Path) -> None:
    made, beton = copied(raw, tmp_path)
    (tmp_path / "train.beton.json").unlink()
    with pytest.raises(UsageError, match="does not exist"):
        FfcvFeed(beton, made.view.digest, samples_of(made), 4, 0, 1, CPU)
