import functools
import json
import re
import shutil
import tarfile
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from iqpir.config import digest
from iqpir.errors import UsageError, VerificationError
from pipeline.commits.records import commit
from pipeline.corpus import Corpus
from pipeline.documents import publish_table, stamped
from pipeline.gc import GcConfig, gc
from pipeline.layout import (
    MANIFEST,
    ObjectRef,
    from_parquet,
    labels_index_path,
    labels_path,
    manifest_path,
    metric_facts_path,
    scores_path,
    sha256_hex,
    to_json,
    to_parquet,
)
from pipeline.shard import ShardResult
from pipeline.status import StatusConfig, status
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, verify
from tests.pipeline.corpus.conftest import Requests


@pytest.fixture
def root(draw: Callable[..., Path], sharded: Callable[..., ShardResult]) -> Path:
    source = draw(9)
    (source / "bad.png").write_text("bad")
    return Path(sharded(source).corpus)


def lie(root: Path, **options: bool) -> str:
    with pytest.raises(VerificationError) as caught:
        verify(VerifyConfig(corpus=str(root), workers=0, **options))
    assert caught.value.exit_code == 4
    return str(caught.value)


def one(root: Path, pattern: str) -> Path:
    return sorted(root.glob(pattern))[0]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def forge(root: Path, path: Path) -> None:
    """Make manifest, record and ``_SUCCESS`` agree with what ``path`` holds now: only its content lies."""
    name, data = path.relative_to(root).as_posix(), path.read_bytes()
    field = "shard" if name.startswith("shards/") else "table"
    manifest = root / manifest_path(1, "parquet")
    rows = from_parquet(manifest.read_bytes()).to_pylist()
    for row in rows:
        if row[field] == name:
            row[f"{field}_bytes"], row[f"{field}_sha256"] = len(data), sha256_hex(data)
            unit_id = row["unit_id"]
    table = to_parquet(pa.Table.from_pylist(rows, schema=MANIFEST))
    manifest.write_bytes(table)
    facts = json.loads((root / manifest_path(1, "json")).read_bytes())
    facts["manifest_sha256"] = sha256_hex(table)
    (root / manifest_path(1, "json")).write_bytes(to_json(facts))
    pointer = {
        "version": 1,
        "manifest_sha256": sha256_hex(table),
        "facts_sha256": sha256_hex(to_json(facts)),
    }
    (root / "_SUCCESS").write_bytes(to_json(pointer))
    record = one(root, f"_commits/shard/*/{unit_id}.json")
    values = json.loads(record.read_bytes())
    for item in values["objects"]:
        if item["path"] == name:
            item["bytes"], item["sha256"] = len(data), sha256_hex(data)
    record.write_bytes(to_json(stamped(values)))


def test_a_whole_corpus_is_proved(root: Path) -> None:
    result = verify(VerifyConfig(corpus=str(root), workers=0))
    assert (result.inputs, result.samples, result.units, result.orphans) == (10, 9, 3, 0)
    assert result.objects == 1 + 3 + 3  # the plan, tables, shards


@pytest.mark.slow
def test_a_whole_corpus_is_proved_on_ray(root: Path, local_ray: None) -> None:
    assert verify(VerifyConfig(corpus=str(root), workers=2)).samples == 9


@pytest.mark.parametrize("pattern", ["shards/*", "samples/*"])
@pytest.mark.parametrize("position", [0, 600, -1])
def test_a_flipped_bit_of_an_object_is_found(root: Path, pattern: str, position: int) -> None:
    path = one(root, pattern)
    flip(path, position)
    assert path.name in lie(root)


@pytest.mark.parametrize(
    "pattern",
    ["_SUCCESS", "_manifest/*.json", "_manifest/*.parquet", "_plan/*.json", "_plan/*.parquet", "shards.txt"],
)
def test_any_flipped_bit_of_a_control_file_is_found(root: Path, pattern: str, tmp_path: Path) -> None:
    path = one(root, pattern)
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 40)):
        flip(path, position)
        lie(root)
        path.write_bytes(whole)
    verify(VerifyConfig(corpus=str(root), workers=0))


def test_a_tar_that_is_cut_at_a_member_is_found_even_if_the_records_agree(root: Path) -> None:
    path = one(root, "shards/*")
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-2].offset
    path.write_bytes(path.read_bytes()[:last])
    assert "bytes" in lie(root)
    forge(root, path)
    assert "end-of-archive" in lie(root)


def test_a_well_formed_tar_with_fewer_members_is_found(root: Path) -> None:
    path = one(root, "shards/*")
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-2].offset
    path.write_bytes(whole[:last].ljust(-(-(last + 1024) // 10240) * 10240, b"\0"))
    forge(root, path)
    assert "its members are not those of" in lie(root)


@pytest.mark.parametrize("pattern", ["shards/*", "samples/*", "_plan/*.parquet", "_manifest/*.parquet", "_SUCCESS"])
def test_a_missing_file_is_found(root: Path, pattern: str) -> None:
    one(root, pattern).unlink()
    lie(root)
    lie(root, deep=False)


def test_a_row_too_few_is_found(root: Path) -> None:
    path = one(root, "samples/*")
    path.write_bytes(to_parquet(from_parquet(path.read_bytes()).slice(1)))
    forge(root, path)
    assert "its record says" in lie(root)


def test_a_key_in_two_units_is_found(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = sorted(root.glob("samples/*"))[:2]
    key = from_parquet(first.read_bytes())["key"][0].as_py()
    table = from_parquet(second.read_bytes())
    rows = table.to_pylist()
    rows[0]["key"] = key
    second.write_bytes(to_parquet(pa.Table.from_pylist(rows, schema=table.schema)))
    forge(root, second)
    lie(root)
    assert f"keys of other units, such as {key}" in caplog.text


def publish_scores_and_labels(corpus: Corpus, table: pa.Table) -> tuple[str, str]:
    """``table`` as the scores and as the labels of the first unit, with every document; returns both paths."""
    storage, unit = corpus.storage, corpus.manifest().units[0]
    facts = {"name": "m", "version": "1"}
    fingerprint = digest(facts)
    scores = publish_table(storage, table, functools.partial(scores_path, "m", fingerprint, 0))
    commit(storage, "score-m", fingerprint, unit.unit_id, {"objects": [scores.to_dict()]})
    storage.publish(metric_facts_path("m", fingerprint), to_json(stamped({**facts, "fingerprint": fingerprint})))
    labels = publish_table(storage, table, functools.partial(labels_path, "plain", 0), {"a": "b"})
    index = {
        "name": "plain",
        "metrics": {"m": fingerprint},
        "manifest": corpus.manifest().digest,
        "objects": [labels.to_dict()],
    }
    storage.publish(labels_index_path("plain"), to_json({**index, "digest": digest(index)}))
    return scores.path, labels.path


ROWLESS, TWICE = "has no row for 1 samples of unit 000000", "has a key twice"


@pytest.mark.parametrize(
    ("damage", "of_scores", "of_labels"),
    [
        ("none", "", ""),
        ("row missing", ROWLESS, ROWLESS),
        ("doubled", TWICE, TWICE),
        ("flipped", "its sha256 differs from its record's", ""),
        ("absent", "", "is missing, labels/plain/_labels.json names it"),
    ],
)
def test_scores_and_labels_have_a_row_for_every_sample(
    root: Path, damage: str, of_scores: str, of_labels: str, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = Corpus(str(root))
    table = corpus.unit_samples(corpus.manifest().units[0], ["key"])
    if damage == "row missing":
        table = table.slice(1)
    if damage == "doubled":
        table = pa.concat_tables([table, table.slice(0, 1)])
    scores, labels = publish_scores_and_labels(corpus, table)
    if damage == "flipped":
        flip(root / scores, 100)
    if damage == "absent":
        (root / labels).unlink()
    if damage == "none":
        assert verify(VerifyConfig(corpus=str(root), workers=0)).objects == 9
        return
    lie(root)
    expected = [f"{path}: {text}" for path, text in ((scores, of_scores), (labels, of_labels)) if text]
    assert sorted(record.message for record in caplog.records) == sorted(expected)


@pytest.mark.slow
def test_the_same_lies_are_found_in_a_bucket(
    s3: Requests, draw: Callable[..., Path], sharded: Callable[..., ShardResult]
) -> None:
    """A shard is proved from a copy on this machine there, not from the file itself."""
    storage = Storage.open(f"s3://pictures/{uuid.uuid4().hex}")
    config = VerifyConfig(corpus=sharded(draw(5), storage.url).corpus, workers=0)
    assert verify(config).samples == 5
    for folder in ("shards/", "samples/", "_commits/shard/", "_plan/", "_SUCCESS"):
        path = next(entry.path for entry in storage.list() if entry.path.startswith(folder))
        whole = storage.read(path)
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2]):
            storage.publish(path, damaged)
            with pytest.raises(VerificationError, match=re.escape(path)):
                verify(config)
        storage.remove(path)
        with pytest.raises(VerificationError, match=re.escape(path)):
            verify(config)
        storage.publish(path, whole)
    assert verify(config).samples == 5


def test_what_is_not_sealed_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no sealed corpus"):
        verify(VerifyConfig(corpus=str(tmp_path)))


def test_orphans_are_counted_and_only_old_ones_go(root: Path) -> None:
    (root / "shards" / "images-000000-000000000000.tar").write_bytes(b"half")
    (root / "shards" / ".x.tar.00.tmp").write_bytes(b"half")
    assert verify(VerifyConfig(corpus=str(root), workers=0)).orphans == 1
    young = gc(GcConfig(corpus=str(root), dry_run=False))
    assert (young.orphans, young.young, young.removed) == (0, 2, 0)
    counted = gc(GcConfig(corpus=str(root), grace_hours=0.0))
    assert (counted.orphans, counted.unfinished, counted.removed) == (1, 1, 0)
    assert gc(GcConfig(corpus=str(root), grace_hours=0.0, dry_run=False)).removed == 2
    assert verify(VerifyConfig(corpus=str(root), workers=0)).orphans == 0


def test_gc_never_removes_what_a_record_names(root: Path) -> None:
    (root / "_SUCCESS").unlink()
    shutil.rmtree(root / "_manifest")
    before = sorted(root.rglob("*.*"))
    assert gc(GcConfig(corpus=str(root), grace_hours=0.0, dry_run=False)).removed == 0
    assert sorted(root.rglob("*.*")) == before


def test_gc_refuses_a_folder_that_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine.tar").write_bytes(b"x")
    with pytest.raises(UsageError, match="no corpus"):
        gc(GcConfig(corpus=str(tmp_path), grace_hours=0.0, dry_run=False))
    assert (tmp_path / "shards" / "mine.tar").exists()


def test_status_says_what_is_missing(root: Path) -> None:
    whole = status(StatusConfig(corpus=str(root)))
    assert (whole.units, whole.done, whole.missing, whole.sealed, whole.current) == (3, 3, [], 1, True)
    for path in sorted(root.glob("_commits/shard/*/*.json")):
        if json.loads(path.read_bytes())["ordinal"] == 1:
            path.unlink()
    (root / "_SUCCESS").unlink()
    shutil.rmtree(root / "_manifest")
    broken = status(StatusConfig(corpus=str(root)))
    assert (broken.done, broken.missing, broken.sealed, broken.current) == (2, [1], 0, False)
    with pytest.raises(UsageError, match="no corpus"):
        status(StatusConfig(corpus=str(root / "shards")))


def test_an_object_reference_survives_json() -> None:
    ref = ObjectRef(path="a", bytes=1, sha256="0" * 64, rows=3)
    assert ObjectRef.from_dict(json.loads(json.dumps(ref.to_dict()))) == ref
