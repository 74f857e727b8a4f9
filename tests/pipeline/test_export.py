"""An export holds the view's samples, says so in a record written last, and never hangs."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from iqpir.errors import PermanentError, UsageError, VerificationError
from iqpir.pixels import PixelPolicy
from pipeline.export import ExportConfig, export
from pipeline.exports.balance import deal
from pipeline.exports.beton import BetonPlan, page_size_for, write_beton
from pipeline.layout import sha256_hex
from pipeline.storage import Storage
from tests.pipeline.corpus.conftest import s3 as s3
from tests.pipeline.corpus.conftest import s3_server as s3_server


def has_ffcv() -> bool:
    try:
        import ffcv  # noqa: F401
    except ImportError:
        return False
    return True


needs_ffcv = pytest.mark.skipif(
    not has_ffcv(), reason="ffcv (extra `export`, needs Debian's libopencv-dev) is not installed"
)


@pytest.fixture(scope="module")
def made(labelled_corpus: Any) -> Any:
    return labelled_corpus(sides=(32,) * 9 + (48, 64, 40), held_back=3)


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_are_the_original_bytes_with_their_labels(made: Any, tmp_path: Path) -> None:
    result = export(
        ExportConfig(corpus=made.url, view="small", format="files", split="all", output=str(tmp_path / "out"))
    )
    labels = pq.read_table(tmp_path / "out" / "labels.parquet").to_pylist()
    rows = {row["key"]: row for row in made.view.table.to_pylist()}
    assert result.count == len(labels) == len(rows) == 12
    for label in labels:
        row = rows[label["key"]]
        data = (tmp_path / "out" / label["member"]).read_bytes()
        assert sha256_hex(data) == row["sha256"]
        assert label["quality"] == row["quality"]
        assert label["split"] == row["split"]
        assert (tmp_path / "out" / label["member"]).read_bytes() == made.picture(label["relpath"]).read_bytes()


@pytest.mark.parametrize("form", ["files", "tar"])
def test_an_export_to_a_bucket_is_that_to_a_folder(form: str, made: Any, s3: Any, tmp_path: Path) -> None:
    bucket = Storage.open(f"s3://pictures/{uuid.uuid4().hex}")
    small: dict[str, Any] = {"shard_bytes": 12_000} if form == "tar" else {}
    here = ExportConfig(corpus=made.url, view="small", format=form, output=str(tmp_path / "out"), **small)  # type: ignore[arg-type]
    there = dataclasses.replace(here, output=bucket.url)
    assert export(here).sha256 == export(there).sha256
    assert {entry.path: bucket.read(entry.path) for entry in bucket.list()} == files_below(tmp_path / "out")
    s3.puts.clear()
    assert not export(there).written and s3.puts == []
    bucket.remove("export.json")  # as if it had been cut off right before its end
    assert export(there).written
    assert {entry.path: bucket.read(entry.path) for entry in bucket.list()} == files_below(tmp_path / "out")


def test_sized_files_are_square_pngs(made: Any, tmp_path: Path) -> None:
    export(
        ExportConfig(corpus=made.url, view="small", format="files", size=24, fit="crop", output=str(tmp_path / "out"))
    )
    pictures = sorted((tmp_path / "out" / "pictures").iterdir())
    assert len(pictures) == 9
    assert {Image.open(path).size for path in pictures} == {(24, 24)}


def test_tars_are_read_by_webdataset_and_are_the_same_bytes_each_time(made: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        result = export(
            ExportConfig(
                corpus=made.url,
                view="small",
                format="tar",
                split="all",
                shard_bytes=12_000,
                output=str(tmp_path / name),
            )
        )
        assert result.written
    one, two = files_below(tmp_path / "one"), files_below(tmp_path / "two")
    assert one == two
    tars = sorted(str(path) for path in (tmp_path / "one").glob("*.tar"))
    assert [Path(path).name for path in tars[:2]] == ["small-000000.tar", "small-000001.tar"]
    rows = {row["key"]: row for row in made.view.table.to_pylist()}
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list(rows)
    for sample in samples:
        row = rows[sample["__key__"]]
        assert sha256_hex(sample["png"]) == row["sha256"]
        label = json.loads(sample["json"])
        assert label["quality"] == pytest.approx(row["quality"])
        assert "byte_offset" not in label


def test_the_record_lists_every_file_with_its_sha256(made: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(ExportConfig(corpus=made.url, view="small", format="tar", output=str(out)))
    record = json.loads((out / "export.json").read_text())
    assert record["view_digest"] == made.view.digest
    listed = {item["path"]: item["sha256"] for item in record["objects"]}
    found = {name: sha256_hex(data) for name, data in files_below(out).items()}
    assert {name: digest for name, digest in found.items() if not name.endswith("export.json")} == listed


def test_the_same_command_again_finds_it_done_and_another_is_refused(made: Any, tmp_path: Path) -> None:
    config = ExportConfig(corpus=made.url, view="small", format="files", output=str(tmp_path / "out"))
    first = export(config)
    again = export(config)
    assert first.written
    assert not again.written
    assert (again.sha256, again.bytes) == (first.sha256, first.bytes)
    with pytest.raises(UsageError, match="split"):
        export(ExportConfig(corpus=made.url, view="small", format="files", split="val", output=str(tmp_path / "out")))
    (tmp_path / "out" / "labels.parquet").write_bytes(b"short")
    with pytest.raises(VerificationError, match=r"labels\.parquet"):
        export(config)


def test_an_interrupted_export_is_finished_by_the_same_command(made: Any, tmp_path: Path) -> None:
    config = ExportConfig(corpus=made.url, view="small", format="tar", output=str(tmp_path / "out"))
    export(config)
    whole = files_below(tmp_path / "out")
    (tmp_path / "out" / "export.json").unlink()
    (tmp_path / "out" / "small-000000.tar").unlink()
    assert export(config).written
    assert files_below(tmp_path / "out") == whole


def test_a_damaged_sample_is_not_exported(labelled_corpus: Any, tmp_path: Path) -> None:
    damaged = labelled_corpus(sides=(32, 32, 32), held_back=1)
    row = damaged.view.split("train").to_pylist()[0]
    shard = Path(damaged.url) / row["shard"]
    data = bytearray(shard.read_bytes())
    data[row["byte_offset"] + 40] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    with pytest.raises(VerificationError):
        export(ExportConfig(corpus=damaged.url, view="small", format="tar", output=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "export.json").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "ffcv", "output": "out.ffcv", "size": 32}, "beton"),
        ({"format": "ffcv", "output": "out.beton"}, "size"),
        ({"format": "tar", "mode": "jpg"}, "ffcv"),
        ({"format": "ffcv", "output": "out.beton", "size": 32, "mode": "jpg", "jpeg_quality": 0}, "outside 1..100"),
        ({"format": "ffcv", "output": "out.beton", "size": 32, "jpeg_quality": 80}, "for mode jpg, not for raw"),
        (
            {"format": "ffcv", "output": "out.beton", "size": 32, "shard_bytes": 9},
            "shard_bytes is for tar, not for ffcv",
        ),
        ({"format": "files", "shard_bytes": 9}, "shard_bytes is for tar, not for files"),
        ({"format": "files", "balance": True}, "balance is for tar, not for files"),
        ({"format": "files", "indexes": ["wids"]}, "indexes is for tar, not for files"),
        ({"format": "files", "jpeg_quality": 80}, "jpeg_quality is for ffcv, not for files"),
        ({"format": "tar", "workers": 2}, "workers is for ffcv, not for tar"),
        ({"format": "tar", "stall_s": 9.0}, "stall_s is for ffcv, not for tar"),
        ({"format": "tar", "fit": "crop"}, "fit crop has no size"),
    ],
)
def test_wrong_configurations_say_what_to_do(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExportConfig(**{"corpus": "c", "view": "v", "output": "out", **changed})


def test_pictures_that_do_not_fit_are_named_before_anything_is_written(made: Any, tmp_path: Path) -> None:
    for fit, count in (("exact", 9), ("crop", 9)):
        with pytest.raises(UsageError, match=f"{count if fit == 'exact' else ''}.* do not fit 40x40"):
            export(
                ExportConfig(
                    corpus=made.url,
                    view="small",
                    format="files",
                    size=40,
                    fit=fit,  # type: ignore[arg-type]
                    output=str(tmp_path / "out"),
                )
            )
    assert not (tmp_path / "out").exists()


def test_pages_hold_the_largest_sample_and_are_powers_of_two() -> None:
    for largest in (1, 3 * 32**2, 3 * 512**2, 3 * 2048**2, 3 * 16384**2):
        page = page_size_for(largest)
        assert page >= largest
        assert page & (page - 1) == 0
        assert 1 << 21 <= page < 1 << 32
    with pytest.raises(UsageError):
        page_size_for(1 << 32)


def beton_plan(made: Any, tmp_path: Path, rows: Any, **changed: Any) -> BetonPlan:
    table = tmp_path / "rows.parquet"
    pq.write_table(rows.select(["shard", "byte_offset", "byte_size", "quality"]), table)
    values = {
        "corpus": made.url,
        "rows": str(table),
        "target": str(tmp_path / "out.beton"),
        "image_size": 32,
        "fit": "exact",
        "mode": "raw",
        "jpeg_quality": 90,
        "page_size": 1 << 21,
        "workers": 1,
        "cache": "",
        "pixels": {"max_pixels": PixelPolicy().max_pixels},
    }
    return BetonPlan(**{**values, **changed})


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}


def is_freed(before: set[str]) -> bool:
    """Python's resource tracker frees shared memory soon after the last process that used it has ended."""
    for _ in range(100):
        if shared_memory() <= before:
            return True
        time.sleep(0.1)
    return False


@needs_ffcv
@pytest.mark.slow
def test_a_sample_larger_than_a_page_fails_where_ffcv_alone_hangs(labelled_corpus: Any, tmp_path: Path) -> None:
    large = labelled_corpus(sides=(1000, 32), held_back=1)
    rows = large.view.table.slice(0, 2)
    before = shared_memory()
    began = time.monotonic()
    with pytest.raises(PermanentError, match="page size is 2097152"):
        write_beton(beton_plan(large, tmp_path, rows, image_size=1000, fit="resize"), stall_s=100)
    assert time.monotonic() - began < 90
    assert is_freed(before)


@needs_ffcv
@pytest.mark.slow
def test_a_writer_that_hangs_is_stopped(labelled_corpus: Any, tmp_path: Path) -> None:
    made = labelled_corpus(sides=(32, 32, 32), held_back=1)
    rows = made.view.split("train")
    shard = Path(made.url) / rows["shard"][0].as_py()
    shard.unlink()
    os.mkfifo(shard)  # opening it waits for a writer that never comes
    before = shared_memory()
    with pytest.raises(PermanentError, match="no new sample for 25 s"):
        write_beton(beton_plan(made, tmp_path, rows), stall_s=25)
    assert is_freed(before)


LOOKS_AWAY = """
import sys
from pipeline.exports import beton_writer
worker = beton_writer.Worker(target=sys.exit, args=(3,))
worker.start()
worker.join()
import multiprocessing
multiprocessing.active_children()  # ffcv's own starting of processes forgets the ended ones, too
beton_writer.watch(type("Samples", (), {"read": multiprocessing.Value("Q", 0)}))
"""


@pytest.mark.slow
@needs_ffcv
def test_a_worker_that_died_before_anybody_looked_is_seen() -> None:
    done = subprocess.run([sys.executable, "-c", LOOKS_AWAY], stdout=subprocess.DEVNULL, timeout=60, check=False)
    assert done.returncode == 1


@pytest.mark.slow
@needs_ffcv
def test_a_writer_whose_reader_has_gone_leaves() -> None:
    gone, stays = os.pipe()
    os.close(gone)
    done = subprocess.run([sys.executable, "-c", LOOKS_AWAY.replace("3,", "0,")], stdout=stays, timeout=60, check=False)
    os.close(stays)
    assert done.returncode == 1


@needs_ffcv
@pytest.mark.slow
def test_betons_are_complete_or_absent(labelled_corpus: Any, tmp_path: Path) -> None:
    made = labelled_corpus(sides=(32,) * 5, held_back=2)
    path = tmp_path / "new" / "train.beton"
    config = ExportConfig(corpus=made.url, view="small", output=str(path), size=32, workers=2)
    first = export(config)
    assert first.written
    assert sorted(item.name for item in path.parent.iterdir()) == ["train.beton", "train.beton.json"]
    facts = json.loads(path.with_name("train.beton.json").read_text())
    assert facts["sha256"] == first.sha256 == sha256_hex(path.read_bytes())
    assert (facts["count"], facts["view_digest"]) == (3, made.view.digest)
    assert not export(config).written
    shard = Path(made.url) / made.view.split("train")["shard"][0].as_py()
    shard.chmod(0o644)
    shard.write_bytes(bytes(shard.stat().st_size))
    path.write_bytes(path.read_bytes()[:-1])  # so that the earlier export does not count
    with pytest.raises(PermanentError):
        export(config)
    assert sorted(item.name for item in path.parent.iterdir()) == ["train.beton", "train.beton.json"]


@needs_ffcv
@pytest.mark.slow
def test_ffcv_itself_reads_what_was_exported(labelled_corpus: Any, tmp_path: Path) -> None:
    made = labelled_corpus(sides=(32,) * 5, held_back=2)
    path = tmp_path / "train.beton"
    export(ExportConfig(corpus=made.url, view="small", output=str(path), size=32, workers=1))
    from pipeline.exports.beton_reader import load_pictures

    rows = made.view.split("train").to_pylist()
    for row, picture in zip(rows, load_pictures(path, [0, 1, 2]), strict=True):
        with tarfile.open(Path(made.url) / row["shard"]) as tar:
            member = tar.extractfile(row["member"])
            assert member is not None
            original = np.asarray(Image.open(io.BytesIO(member.read())).convert("RGB"))
        assert np.array_equal(picture, original)


def dealt(qualities: Any, sizes: Any, limit: int) -> list[dict[str, np.ndarray]]:
    """The tars that ``deal`` makes: quality and byte_size of their rows."""
    table = pa.table({"quality": pa.array(qualities, pa.float32()), "byte_size": pa.array(sizes, pa.int64())})
    rows, shares = deal(table.append_column("place", pa.array(range(len(sizes)))), limit)
    assert sorted(rows["place"].to_pylist()) == list(range(len(sizes)))
    ends = np.cumsum(shares)
    parts = [rows.slice(end - share, share) for share, end in zip(shares, ends, strict=True)]
    assert all(part["place"].to_pylist() == sorted(part["place"].to_pylist()) for part in parts)
    return [{name: part[name].to_numpy() for name in ("quality", "byte_size")} for part in parts]


def test_balanced_tars_have_the_views_qualities_numbers_and_bytes(rng: np.random.Generator) -> None:
    quality = rng.beta(4, 2, 4000)
    # The better a picture the larger its file, as it is with JPEG: in the order of quality the tars would differ.
    sizes = (rng.lognormal(11, 0.6, 4000) * (0.5 + quality)).astype(int)
    tars = dealt(quality, sizes, int(sizes.sum() / 20) + 1)
    assert len(tars) == 20
    counts, sums = np.array([[len(tar["quality"]), tar["byte_size"].sum()] for tar in tars]).T
    assert counts.max() - counts.min() <= 1
    assert sums.max() / sums.min() < 1.03
    wanted = np.quantile(quality, np.linspace(0.05, 0.95, 10))
    for tar in tars:
        assert np.abs(np.quantile(tar["quality"], np.linspace(0.05, 0.95, 10)) - wanted).max() < 0.02


@pytest.mark.parametrize(("count", "limit", "tars"), [(1, 10, 1), (3, 10**9, 1), (3, 1, 3), (7, 35, 2)])
def test_any_number_of_samples_can_be_dealt(count: int, limit: int, tars: int) -> None:
    assert len(dealt(np.linspace(0, 1, count), [10] * count, limit)) == tars


def test_a_balanced_export_has_all_samples_once_and_its_labels_say_where(made: Any, tmp_path: Path) -> None:
    sizes = made.view.table["byte_size"].to_numpy()
    config = ExportConfig(
        corpus=made.url, view="small", format="tar", split="all", balance=True,
        shard_bytes=int(sizes.sum() / 3) + 1, output=str(tmp_path / "out"),
    )  # fmt: skip
    assert export(config).written
    assert not export(config).written
    labels = pq.read_table(tmp_path / "out" / "labels.parquet").to_pylist()
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert len(tars) == 3
    found = [
        (path.name, sample["__key__"], json.loads(sample["json"])["relpath"])
        for path in tars
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert found == [(label["file"], label["key"], label["relpath"]) for label in labels]
    assert {key for _, key, _ in found} == set(made.view.table["key"].to_pylist())
    medians = [np.median([label["quality"] for label in labels if label["file"] == path.name]) for path in tars]
    everything = made.view.table["quality"].to_numpy()
    assert np.abs(np.array(medians) - np.median(everything)).max() < np.std(everything)


def test_indexes_are_made_for_a_finished_export_and_point_at_the_members(made: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = ExportConfig(corpus=made.url, view="small", format="tar", split="all", shard_bytes=12_000, output=str(out))
    export(config)
    before = files_below(out)
    result = export(dataclasses.replace(config, indexes=["dali", "wids"]))
    assert not result.written
    assert {name: data for name, data in files_below(out).items() if name in before} == before
    tars = sorted(out.glob("*.tar"))
    assert sorted(Path(path).name for path in result.indexes) == sorted(
        ["wids.json", *(path.with_suffix(".idx").name for path in tars)]
    )
    index = json.loads((out / "wids.json").read_text())
    assert index["wids_version"] == 1
    for path, shard in zip(tars, index["shardlist"], strict=True):
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
        assert shard == {"url": path.name, "nsamples": len(samples), "filesize": path.stat().st_size}
        header, *lines = path.with_suffix(".idx").read_text().splitlines()
        assert header == f"v1.2 {len(samples)}"
        data = path.read_bytes()
        for line, sample in zip(lines, samples, strict=True):
            words = line.split(" ")
            for extension, offset, size, name in zip(*(words[start::4] for start in range(4)), strict=True):
                assert name == f"{sample['__key__']}.{extension}"
                assert data[int(offset) : int(offset) + int(size)] == sample[extension]
            assert {words[0], words[4]} == {"png", "json"}


def test_a_cut_tar_gets_no_index(made: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = ExportConfig(corpus=made.url, view="small", format="tar", output=str(out), indexes=["dali"])
    export(config)
    tar = next(out.glob("*.tar"))
    data = tar.read_bytes()
    tar.chmod(0o644)
    tar.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(VerificationError, match=r"tar"):
        export(config)
