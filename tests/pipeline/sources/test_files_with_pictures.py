"""WebDataset tars and Parquet files with encoded pictures."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iqpir.errors import UsageError
from pipeline.commits.plan import extend_plan
from pipeline.corpus import Corpus
from pipeline.shard import ShardConfig, ShardResult
from pipeline.sharding.shard_unit import ShardWork
from pipeline.sources import parquet_files
from pipeline.sources.find import SourceConfig, find_inputs
from pipeline.sources.http import HttpConfig
from pipeline.sources.patterns import expand_braces, matcher
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, verify
from tests.pipeline.sources.conftest import Web
from tests.pipeline.sources.corpus_rows import rows_of

Sharded = Callable[..., ShardResult]


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def tars(tmp_path: Path, pictures: list[bytes]) -> Path:
    """Two tars as ``webdataset.ShardWriter`` makes them."""
    import webdataset

    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"train-{number:03d}.tar")) as writer:
            for index in range(3):
                picture = pictures[3 * number + index]
                sides = {"json": {"n": index}, "cls": index, "txt": f"picture \u00e4 {index}"}
                writer.write({"__key__": f"dir/{number}{index}", "png": picture, **sides})
    return folder


def oracle(folder: Path) -> dict[str, dict[str, Any]]:
    import webdataset

    urls = sorted(map(str, folder.glob("*.tar")))
    found = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return {sample["__key__"]: sample for sample in found}


@pytest.mark.parametrize(
    "how", ["folder", "*.tar", "train-{000..001}.tar", "train-{000,001}.tar", "**/train-00[01].tar"]
)
def test_tars_give_what_webdataset_reads_from_them(how: str, tars: Path, sharded: Sharded) -> None:
    result = sharded(tars if how == "folder" else f"{tars}/{how}")
    expected = oracle(tars)
    assert result.statuses == {"success": 6} and len(expected) == 6
    for relpath, row in rows_of(result.corpus).items():
        metadata = json.loads(row["metadata"])
        sample = expected.pop(metadata["__key__"])
        assert Corpus(result.corpus).read_sample(row) == sample["png"]
        assert metadata["json"] == json.loads(sample["json"])
        assert metadata["cls"] == int(sample["cls"]) and metadata["txt"] == sample["txt"].decode()
        assert relpath == f"{Path(sample['__url__']).name}#member={sample['__key__']}.png"
        assert row["uri"].endswith(relpath)
    assert not expected
    assert verify(VerifyConfig(corpus=result.corpus, workers=0)).samples == 6


def test_tars_in_a_store_are_read_by_ranges(tars: Path, sharded: Sharded) -> None:
    storage = Storage.open("memory://tars-by-ranges/in")
    for path in tars.iterdir():
        storage.publish(path.name, path)
    remote, local = sharded("memory://tars-by-ranges/in"), sharded(tars, corpus=f"{tars}-corpus")
    digests = [{name: row["sha256"] for name, row in rows_of(each.corpus).items()} for each in (remote, local)]
    assert digests[0] == digests[1] and len(digests[0]) == 6


def test_appending_a_tar_leaves_the_others_closed(tars: Path, sharded: Sharded, pictures: list[bytes]) -> None:
    first = sharded(tars)
    write_tar(tars / "train-002.tar", [("a.b.png", pictures[0])])
    for path in (tars / "train-000.tar", tars / "train-001.tar"):
        path.chmod(0)  # changes no etag; whoever is no superuser could not open them
    listing = find_inputs(str(tars), SourceConfig(), lambda url, reading: known(tars, "train-000.tar", "train-001.tar"))
    assert listing.table["relpath"].to_pylist() == ["train-002.tar#member=a.b.png"]
    second = sharded(tars)
    assert (second.samples, second.version, second.skipped_units) == (7, 2, first.units)
    metadata = json.loads(rows_of(second.corpus)["train-002.tar#member=a.b.png"]["metadata"])
    assert metadata == {"__key__": "a"}


def known(folder: Path, *names: str) -> dict[str, str]:
    return {name: str((folder / name).stat().st_mtime_ns) for name in names}


def test_a_changed_tar_replaces_its_samples(tars: Path, sharded: Sharded, pictures: list[bytes]) -> None:
    sharded(tars)
    write_tar(tars / "train-000.tar", [("dir/00.png", pictures[5])])
    result = sharded(tars)
    rows = rows_of(result.corpus)
    assert (
        result.samples == 6
        and Corpus(result.corpus).read_sample(rows["train-000.tar#member=dir/00.png"]) == pictures[5]
    )
    assert sharded(tars, prune=True).samples == 4


def test_a_sample_with_several_pictures_needs_a_choice(tmp_path: Path, sharded: Sharded, pictures: list[bytes]) -> None:
    path = write_tar(tmp_path / "pairs.tar", [("a.LQ.png", pictures[0]), ("a.hq.png", pictures[1]), ("b.txt", b"only")])
    with pytest.raises(UsageError, match=r"hq\.png, lq\.png"):
        sharded(path)
    result = sharded(path, source=SourceConfig(member="hq.png"))
    assert list(rows_of(result.corpus)) == ["pairs.tar#member=a.hq.png"] and result.ignored == 2


def test_members_that_are_no_samples_are_counted(tmp_path: Path, pictures: list[bytes]) -> None:
    members = [("__meta__", b"x"), ("a.png", pictures[0]), ("a.bin", b"?"), ("c.json", b"{}"), ("a.png", pictures[1])]
    listing = find_inputs(str(write_tar(tmp_path / "a.tar", members)), SourceConfig())
    assert listing.table["relpath"].to_pylist() == ["a.tar#member=a.png"] and listing.ignored == 4


def test_long_names_and_pax_headers_are_read(tmp_path: Path, sharded: Sharded, pictures: list[bytes]) -> None:
    name = "folder/" * 30 + "\u00fcber.png"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / f"{form}.tar", [(name, pictures[form])], form)
        result = sharded(path, corpus=str(tmp_path / f"corpus{form}"))
        (row,) = rows_of(result.corpus).values()
        assert Corpus(result.corpus).read_sample(row) == pictures[form]


@pytest.mark.parametrize("where", ["boundary", "data", "header", "flip", "empty"])
def test_a_damaged_tar_gives_its_sound_members_and_a_row(
    where: str, tmp_path: Path, sharded: Sharded, pictures: list[bytes]
) -> None:
    whole = write_tar(tmp_path / "in/b.tar", [(f"{number}.png", pictures[number]) for number in range(3)])
    write_tar(tmp_path / "in/a.tar", [("x.png", pictures[3])])
    data = bytearray(whole.read_bytes())
    with tarfile.open(whole) as tar:
        last = tar.getmembers()[-1]
    if where == "flip":
        data[last.offset + 3] ^= 1
    ends = {"boundary": last.offset, "data": last.offset_data + 100, "header": last.offset + 100, "empty": 0}
    whole.write_bytes(data[: ends.get(where, len(data))])
    result = sharded(tmp_path / "in")
    rows = rows_of(result.corpus)
    damage = rows["b.tar"]["status"]
    assert damage == ("failed_tar_corrupt" if where in ("flip", "empty") else "failed_tar_truncated")
    sound = {name for name, row in rows.items() if row["status"] == "success"}
    expected = {"a.tar#member=x.png"} | ({f"b.tar#member={n}.png" for n in range(2)} if where != "empty" else set())
    assert sound == expected
    assert rows.get("b.tar#member=2.png", {}).get("status") == ("failed_truncated" if where == "data" else None)
    assert verify(VerifyConfig(corpus=result.corpus, workers=0)).samples == len(expected)


def test_side_members_that_cannot_be_kept_are_named(tmp_path: Path, sharded: Sharded, pictures: list[bytes]) -> None:
    members = [("a.txt", b"\xff"), ("a.json", b"{no"), ("a.cls", b"x" * (1 << 20) + b"x"), ("a.png", pictures[0])]
    (row,) = rows_of(sharded(write_tar(tmp_path / "a.tar", members)).corpus).values()
    assert json.loads(row["metadata"])["unread"].keys() == {"txt", "json", "cls"}


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path: Path, pictures: list[bytes | None], column: str = "image", plain: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = pictures if plain else [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(pictures)]
    table = pa.table(
        {
            column: pa.array(values, pa.binary() if plain else IMAGE),
            "label": list(range(len(pictures))),
            "words": [[f"w{number}"] for number in range(len(pictures))],
            "mask": [b"x"] * len(pictures),
        }
    )
    pq.write_table(table, path, row_group_size=4)
    return path


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("store", [False, True])
def test_parquet_rows_become_samples(
    plain: bool, store: bool, tmp_path: Path, sharded: Sharded, pictures: list[bytes]
) -> None:
    path = write_parquet(tmp_path / "in/part-0.parquet", [*pictures, *pictures[:3], None, b"no picture"], plain=plain)
    source = str(tmp_path / "in")
    if store:
        source = f"memory://parquet-{plain}/in"
        Storage.open(source).publish("part-0.parquet", path)
    result = sharded(source)
    assert result.statuses == {"success": 9, "failed_no_bytes": 1, "failed_not_an_image": 1}
    rows = rows_of(result.corpus)
    for number in range(9):
        row = rows[f"part-0.parquet#row_group={number // 4}&row={number % 4}"]
        assert Corpus(result.corpus).read_sample(row) == pictures[number % 6]
        expected = {"label": number, "words": [f"w{number}"], **({} if plain else {"path": f"{number}.png"})}
        assert json.loads(row["metadata"]) == expected
    assert verify(VerifyConfig(corpus=result.corpus, workers=0)).samples == 9
    assert sharded(source).manifest == result.manifest


def test_another_column_can_be_named(tmp_path: Path, sharded: Sharded, pictures: list[bytes]) -> None:
    path = write_parquet(tmp_path / "a.parquet", [*pictures[:2]], column="photo")
    result = sharded(path, source=SourceConfig(column="photo"))
    assert result.samples == 2
    with pytest.raises(UsageError, match=r"source\.column"):
        sharded(path)


def test_a_damaged_parquet_file_is_rows(tmp_path: Path, sharded: Sharded, pictures: list[bytes]) -> None:
    write_parquet(tmp_path / "in/a.parquet", pictures[:2])
    (tmp_path / "in/b.parquet").write_bytes(b"PAR1 no footer")
    write_parquet(tmp_path / "in/c.parquet", pictures[:2], column="photo")
    broken = write_parquet(tmp_path / "in/d.parquet", pictures)
    data = bytearray(broken.read_bytes())
    data[4:40] = b"\xff" * 36  # the first page's header
    broken.write_bytes(data)
    rows = rows_of(sharded(tmp_path / "in").corpus)
    assert rows["b.parquet"]["status"] == "failed_parquet_corrupt"
    assert rows["c.parquet"]["status"] == "failed_parquet_column"
    assert rows["d.parquet#row_group=0&row=0"]["status"] == "failed_parquet_corrupt"
    assert sum(row["status"] == "success" for row in rows.values()) >= 2


def test_a_row_group_is_read_in_small_batches(tmp_path: Path) -> None:
    """What is in memory at a time is a few rows, however large the row group is."""
    table = pa.table({"image": pa.array([os.urandom(1000) for _ in range(500)], pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    listing = find_inputs(str(tmp_path / "a.parquet"), SourceConfig())
    assert listing.count == 500 and 900 < listing.table["size"][0].as_py() < 1100
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        batches = list(parquet_files._batches(file, 0, {3, 499}))
        assert [[row for row, _ in batch] for batch in batches] == [[3], [499]]
        assert max(map(len, parquet_files._batches(file, 0, set(range(500))))) <= 8


def test_a_file_that_changes_or_goes_after_planning_is_rows(tars: Path, sharded: Sharded, tmp_path: Path) -> None:
    for kind, path in (("tar", tars / "train-000.tar"), ("parquet", tmp_path / "p/a.parquet")):
        if kind == "parquet":
            write_parquet(path, [b"x"] * 6)
        config = ShardConfig(input=str(path), corpus="c", workers=0)
        unit, work = planned_unit(config, tmp_path / f"corpus-{kind}")
        path.touch()
        assert set(work(unit)["statuses"]) == {"failed_input_changed"}
        path.unlink()
        assert set(work(unit)["statuses"]) == {"failed_missing"}


def planned_unit(config: Any, corpus: Path) -> tuple[Any, Any]:
    storage = Storage.open(str(corpus))
    listing = find_inputs(config.input, config.source)
    (generation,) = extend_plan(storage, listing, "images", config.settings)
    work = ShardWork(corpus=storage, pixels=config.pixels, min_side=1, threads=1)
    return next(iter(generation.units())), work


def test_folders_of_both_kinds_need_a_choice(tars: Path, sharded: Sharded, pictures: list[bytes]) -> None:
    write_parquet(tars / "a.parquet", pictures[:1])
    with pytest.raises(UsageError, match=r"source\.kind"):
        sharded(tars)
    result = sharded(tars, source=SourceConfig(kind="parquet"))
    assert (result.samples, result.ignored) == (1, 2)
    assert sharded(tars, source=SourceConfig(kind="webdataset")).samples == 7


def test_patterns_with_missing_files_and_nonsense_are_usage_errors(tars: Path) -> None:
    for pattern, message in (
        ("train-{000..002}.tar", "train-002.tar"),
        ("*.zip", "Nothing is named"),
        ("train-{2..1}.tar", "backwards"),
        ("train-{0..9999999}.tar", "more than"),
    ):
        with pytest.raises(UsageError, match=message):
            find_inputs(f"{tars}/{pattern}", SourceConfig())
    with pytest.raises(UsageError, match="bucket"):
        find_inputs("s3://*/a.tar", SourceConfig())


def test_braces_are_those_of_webdataset() -> None:
    from braceexpand import braceexpand

    for pattern in ("a-{000..012}.tar", "{a,b}/{1..3}.tar", "plain.tar", "{09..11}{x,y}"):
        assert expand_braces(pattern) == list(braceexpand(pattern))


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("*.tar", "a.tar", True), ("*.tar", "b/a.tar", False), ("**/*.tar", "b/c/a.tar", True),
        ("**/*.tar", "a.tar", True), ("a?.tar", "ab.tar", True), ("a[!b].tar", "ab.tar", False),
        ("a.tar", "axtar", False),
    ],
)  # fmt: skip
def test_wildcards_stay_within_folders(pattern: str, name: str, fits: bool) -> None:
    assert bool(matcher(pattern).fullmatch(name)) == fits


def test_threads_change_no_byte(tars: Path, sharded: Sharded, tmp_path: Path, pictures: list[bytes]) -> None:
    write_parquet(tmp_path / "rows/a.parquet", pictures)
    for source in (tars, tmp_path / "rows"):
        manifests = {
            sharded(source, corpus=str(tmp_path / f"{source.name}{threads}"), threads=threads).manifest
            for threads in (1, 4)
        }
        assert len(manifests) == 1


@pytest.mark.slow
def test_workers_change_no_byte(
    tars: Path, sharded: Sharded, tmp_path: Path, pictures: list[bytes], web: Web, local_ray: None
) -> None:
    """Tars, Parquet files and addresses are read on Ray as they are in this process."""
    write_parquet(tmp_path / "rows/a.parquet", pictures)
    web.files |= {f"/{number}.png": data for number, data in enumerate(pictures)}
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{web.url}/{number}.png\n" for number in range(6)))
    for source in (tars, tmp_path / "rows", path):
        results = [
            sharded(
                source,
                corpus=str(tmp_path / f"corpus-{source.name}-{workers}"),
                workers=workers,
                http=HttpConfig(allow_private=True),
            )
            for workers in (0, 2)
        ]
        assert results[0].manifest == results[1].manifest and results[0].samples == 6
