import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from iqpir.errors import PermanentError, UsageError
from iqpir.pixels import PixelPolicy, decode
from pipeline.corpus import Corpus
from pipeline.layout import SAMPLES, from_parquet
from pipeline.shard import ShardConfig, ShardResult, shard
from pipeline.sharding.crops import CropPolicy
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, verify

Draw = Callable[..., Path]
Sharded = Callable[..., ShardResult]


def files(corpus: Path | str) -> dict[str, bytes]:
    storage = Storage.open(str(corpus))
    return {entry.path: storage.read(entry.path) for entry in storage.list()}


def test_every_sample_is_byte_for_byte_its_input(draw: Draw, sharded: Sharded) -> None:
    source = draw(9)
    result = sharded(source)
    corpus = Corpus(result.corpus)
    rows = corpus.samples().to_pylist()
    assert {row["relpath"] for row in rows} == {path.name for path in source.iterdir()}
    for row in rows:
        assert corpus.read_sample(row) == (source / row["relpath"]).read_bytes()
        assert (row["width"], row["height"], row["format"]) == (48, 40, "PNG")
    assert (result.inputs, result.success, result.samples, result.units) == (9, 9, 9, 3)


def test_bad_inputs_become_rows_that_say_why(draw: Draw, sharded: Sharded) -> None:
    source = draw(5)
    whole = (source / "000.png").read_bytes()
    (source / "cut.png").write_bytes(whole[: len(whole) // 2])
    (source / "empty.JPG").write_bytes(b"")
    (source / "text.png").write_text("no picture")
    (source / "notes.txt").write_text("ignored")
    Image.new("RGB", (40, 8)).save(source / "thin.png")
    result = sharded(source)
    assert result.statuses == {
        "success": 5,
        "failed_truncated": 1,
        "failed_empty": 1,
        "failed_not_an_image": 1,
        "rejected_too_small": 1,
    }
    assert result.inputs == result.success + result.rejected + result.failed == 9
    assert result.ignored == 1
    corpus = Corpus(result.corpus)
    rows = [row for unit in corpus.manifest().units for row in corpus.rows(unit).to_pylist()]
    assert len(rows) == 9 and all(row["error_message"] for row in rows if row["status"] != "success")


def test_a_name_that_lies_about_its_format_gets_the_suffix_of_its_content(draw: Draw, sharded: Sharded) -> None:
    source = draw(1)
    (source / "000.png").rename(source / "really.png.jpeg")
    (row,) = Corpus(sharded(source).corpus).samples().to_pylist()
    assert row["member"] == f"{row['key']}.png" and "." not in row["key"]


def test_only_bad_inputs_seal_nothing(tmp_path: Path, sharded: Sharded) -> None:
    source = tmp_path / "input"
    source.mkdir()
    (source / "a.png").write_text("a")
    (source / "b.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(PermanentError, match="1 failed_empty, 1 failed_not_an_image"):
            sharded(source)
    assert not [path for path in files(tmp_path / "corpus") if path.startswith(("_manifest", "_SUCCESS"))]


@pytest.mark.parametrize("kind", ["empty", "missing", "no pictures", "a file"])
def test_inputs_without_pictures_are_usage_errors_and_write_nothing(
    kind: str, tmp_path: Path, sharded: Sharded
) -> None:
    source = tmp_path / "input"
    if kind != "missing":
        source.mkdir()
    if kind in ("no pictures", "a file"):
        (source / "a.dat").write_text("x")
    with pytest.raises(UsageError):
        sharded(source / "a.dat" if kind == "a file" else source)
    assert not (tmp_path / "corpus").exists()


def test_running_again_does_nothing_and_tells_the_same(draw: Draw, sharded: Sharded, tmp_path: Path) -> None:
    source = draw(10)
    first = sharded(source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")}
    again = sharded(source)
    assert (again.manifest, again.samples, again.skipped_units) == (
        first.manifest,
        first.samples,
        first.units,
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")} == before


def test_a_lost_commit_record_is_worked_off_again_to_the_same_bytes(
    draw: Draw, sharded: Sharded, tmp_path: Path
) -> None:
    source = draw(10)
    first = sharded(source)
    before = files(tmp_path / "corpus")
    lost = sorted((tmp_path / "corpus" / "_commits").rglob("*.json"))[1]
    lost.unlink()
    again = sharded(source)
    assert (again.manifest, again.skipped_units) == (first.manifest, first.units - 1)
    assert files(tmp_path / "corpus") == before


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.sets(st.integers(0, 40)), lost_seal=st.booleans(), threads=st.integers(1, 4))
def test_whatever_a_crash_left_the_corpus_ends_as_the_same_bytes(
    kept: set[int], lost_seal: bool, threads: int, draw: Draw, sharded: Sharded, tmp_path: Path
) -> None:
    """A crash leaves the plan and any subset of the later files, records only after their payload."""
    source = tmp_path / "input" if (tmp_path / "input").exists() else draw(10)
    whole = tmp_path / "whole"
    sharded(source, whole)
    expected = files(whole)
    crashed = tmp_path / uuid.uuid4().hex
    payload = sorted(path for path in expected if path.startswith(("shards/", "samples/")))
    left = {path for number, path in enumerate(payload) if number in kept}
    left |= {path for path in expected if path.startswith("_plan")}
    for path in sorted(path for path in expected if path.startswith("_commits")):
        if {item["path"] for item in json.loads(expected[path])["objects"]} <= left and len(left) % 2:
            left.add(path)
    if lost_seal:
        left |= {path for path in expected if path not in ("_SUCCESS", "_manifest/v000001.parquet")}
    for path in left:
        (crashed / path).parent.mkdir(parents=True, exist_ok=True)
        (crashed / path).write_bytes(expected[path])
    sharded(source, crashed, threads=threads)
    assert files(crashed) == expected


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_no_byte(
    workers: int, draw: Draw, sharded: Sharded, tmp_path: Path, local_ray: None
) -> None:
    source = draw(14)
    sharded(source, tmp_path / "here")
    sharded(source, tmp_path / "ray", workers=workers)
    assert files(tmp_path / "here") == files(tmp_path / "ray")


def test_another_configuration_is_refused_by_the_name_of_the_field(
    draw: Draw, sharded: Sharded, tmp_path: Path
) -> None:
    source = draw(5)
    sharded(source)
    before = files(tmp_path / "corpus")
    for options, name in (
        ({"unit_samples": 5}, "unit_samples"),
        ({"min_side": 8}, "min_side"),
        ({"crop": CropPolicy(size=32)}, "crop.size"),
        ({"pixels": PixelPolicy(max_pixels=1_000_000)}, "pixels"),
    ):
        with pytest.raises(UsageError, match=f"planned with {name}"):
            sharded(source, **options)
    with pytest.raises(UsageError, match="planned with input"):
        sharded(draw(1, "elsewhere"))
    assert files(tmp_path / "corpus") == before


def test_appending_touches_no_old_unit_and_goes_on_numbering(draw: Draw, sharded: Sharded, tmp_path: Path) -> None:
    source = draw(6)
    first = sharded(source)
    before = files(tmp_path / "corpus")
    draw(5, first=6)
    second = sharded(source)
    after = files(tmp_path / "corpus")
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {"_SUCCESS", "shards.txt"}
    assert (first.version, second.version, second.samples, second.skipped_units) == (1, 2, 11, 2)
    assert [unit.ordinal for unit in Corpus(second.corpus).manifest().units] == [0, 1, 2, 3]
    assert verify(VerifyConfig(corpus=second.corpus, workers=0)).samples == 11


def test_a_changed_input_replaces_its_sample_and_keeps_its_key(draw: Draw, sharded: Sharded) -> None:
    source = draw(6)
    corpus = Corpus(sharded(source).corpus)
    old = {row["relpath"]: row for row in corpus.samples().to_pylist()}
    draw(1, first=99).joinpath("099.png").replace(source / "002.png")
    (source / "004.png").write_bytes(b"broken now")
    result = sharded(source)
    new = {row["relpath"]: row for row in Corpus(result.corpus).samples().to_pylist()}
    assert new.keys() == old.keys() - {"004.png"}
    assert new["002.png"]["key"] == old["002.png"]["key"]
    assert new["002.png"]["sha256"] != old["002.png"]["sha256"]
    assert (result.inputs, result.success, result.failed) == (6, 5, 1)
    assert verify(VerifyConfig(corpus=result.corpus, workers=0)).samples == 5


def test_a_vanished_input_keeps_its_sample(draw: Draw, sharded: Sharded) -> None:
    source = draw(6)
    first = sharded(source)
    (source / "001.png").unlink()
    assert sharded(source).manifest == first.manifest


def test_a_second_collection_joins_with_its_own_keys_and_input(draw: Draw, sharded: Sharded) -> None:
    sharded(draw(5, "one"))
    result = sharded(draw(5, "two"), collection="other")
    rows = Corpus(result.corpus).samples(["key", "collection", "shard", "sha256"]).to_pylist()
    assert len({row["key"] for row in rows}) == 10 and len({row["sha256"] for row in rows}) == 5
    assert {row["shard"].split("/")[1].split("-0")[0] for row in rows} == {"images", "other"}


def test_an_input_that_changes_after_planning_is_a_row_and_is_appended_later(
    draw: Draw, sharded: Sharded, tmp_path: Path
) -> None:
    source = draw(4)
    sharded(source)
    for path in files(tmp_path / "corpus"):
        if not path.startswith("_plan"):
            (tmp_path / "corpus" / path).unlink()
    (source / "000.png").write_bytes(b"other")
    (source / "001.png").unlink()
    result = sharded(source)
    assert result.statuses == {"success": 2, "failed_not_an_image": 1, "failed_missing": 1}


def test_crops_are_pngs_of_the_pixels_they_name(draw: Draw, sharded: Sharded) -> None:
    source = draw(3, side=80)
    Image.new("RGB", (80, 80), (9, 9, 9)).save(source / "flat.png")
    Image.new("RGB", (80, 30)).save(source / "small.png")
    policy = CropPolicy(size=32, stride=16, per_picture=5, min_std=4.0)
    result = sharded(source, crop=policy, min_side=1)
    assert result.statuses == {"success": 3, "rejected_flat": 1, "rejected_too_small": 1}
    assert result.samples == 15
    corpus = Corpus(result.corpus)
    for row in corpus.samples().to_pylist():
        crop = decode(corpus.read_sample(row)).array
        whole = decode((source / row["relpath"]).read_bytes()).array
        x, y = row["crop_x"], row["crop_y"]
        assert (crop == whole[y : y + 32, x : x + 32]).all()
        assert (row["original_width"], row["width"]) == (88, 32)
    assert verify(VerifyConfig(corpus=result.corpus, workers=0)).samples == 15


def test_the_same_corpus_on_s3(s3: Any, draw: Draw, sharded: Sharded, tmp_path: Path) -> None:
    source, url = draw(10), f"s3://pictures/{uuid.uuid4().hex}"
    for path in source.iterdir():
        Storage.open(f"{url}/input").publish(path.name, path)
    result = sharded(f"{url}/input", f"{url}/corpus")
    assert result.samples == 10
    assert verify(VerifyConfig(corpus=result.corpus, workers=0)).orphans == 0
    s3.puts.clear()
    assert sharded(f"{url}/input", f"{url}/corpus").manifest == result.manifest
    assert s3.puts == []
    corpus = Corpus(result.corpus)
    for row in corpus.samples().to_pylist():
        assert corpus.read_sample(row) == (source / row["relpath"]).read_bytes()


def test_a_store_without_conditions_gives_the_same_manifest(
    s3: Any, draw: Draw, sharded: Sharded, tmp_path: Path
) -> None:
    s3.deaf = True
    source, url = draw(10), f"s3://pictures/{uuid.uuid4().hex}"
    deaf = sharded(source, url)
    assert deaf.manifest == sharded(source).manifest
    assert sharded(source, url).skipped_units == deaf.units
    assert verify(VerifyConfig(corpus=url, workers=0)).samples == 10
    records = [entry.path for entry in Storage.open(url).list("_commits")]
    assert all(len(path.split("/")) == 5 for path in records) and len(records) == deaf.units


def test_the_same_corpus_in_memory(draw: Draw, sharded: Sharded) -> None:
    url = f"memory://{uuid.uuid4().hex}/corpus"
    result = sharded(draw(6), url)
    assert verify(VerifyConfig(corpus=url, workers=0)).samples == result.samples == 6


def test_webdataset_reads_the_shards(draw: Draw, sharded: Sharded) -> None:
    import webdataset

    source = draw(9)
    root = Path(sharded(source).corpus)
    urls = [str(root / line) for line in (root / "shards.txt").read_text().splitlines()]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert sorted(sample["png"] for sample in samples) == sorted(p.read_bytes() for p in source.iterdir())
    for sample in samples:
        assert json.loads(sample["json"])["key"] == sample["__key__"]


@pytest.mark.slow
def test_ray_data_reads_the_shards(draw: Draw, sharded: Sharded, local_ray: None) -> None:
    import ray

    source = draw(9)
    root = Path(sharded(source).corpus)
    urls = [str(root / line) for line in (root / "shards.txt").read_text().splitlines()]
    rows = ray.data.read_webdataset(urls, decoder=None).take_all()
    assert sorted(row["png"] for row in rows) == sorted(p.read_bytes() for p in source.iterdir())


def test_tables_have_the_schema_and_say_its_version(draw: Draw, sharded: Sharded) -> None:
    corpus = Corpus(sharded(draw(5)).corpus)
    for unit in corpus.manifest().units:
        table = from_parquet(corpus.storage.read(unit.table))
        assert table.schema.equals(SAMPLES)
        assert pq.read_metadata(corpus.storage.local(unit.table)).metadata[b"schema_version"] == b"1"


@pytest.mark.parametrize("name", ["Faces", "a.b", "", "a/b"])
def test_collections_that_make_no_shard_name_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="collection"):
        ShardConfig(input="a", corpus="b", collection=name)


def test_reading_before_the_seal_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no sealed corpus"):
        Corpus(str(tmp_path)).samples()


def test_shard_is_importable_as_a_verb() -> None:
    assert shard.__doc__ and shard.__doc__.startswith("Cut a folder or bucket")
