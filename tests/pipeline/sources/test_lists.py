import gzip
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from iqpir.errors import PermanentError, UsageError
from iqpir.pixels import PixelPolicy
from pipeline.corpus import Corpus
from pipeline.shard import ShardResult
from pipeline.sources.find import SourceConfig, find_inputs
from pipeline.sources.http import HttpConfig
from pipeline.sources.uri_list import resolve
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, verify
from tests.pipeline.sources.conftest import Web
from tests.pipeline.sources.corpus_rows import rows_of

Sharded = Callable[..., ShardResult]
OPEN = HttpConfig(allow_private=True, backoff=0.01, timeout=0.5, attempts=2)


@pytest.fixture
def folder(tmp_path: Path, pictures: list[bytes]) -> Path:
    path = tmp_path / "lists"
    (path / "sub").mkdir(parents=True)
    for number, data in enumerate(pictures[:4]):
        (path / "sub" / f"{number}.png").write_bytes(data)
    return path


ROWS = [{"url": f"sub/{number}.png", "caption": f"number {number}, \u00e4", "author": "me"} for number in range(4)]


def write_list(folder: Path, kind: str) -> Path:
    path = folder / f"list.{kind}"
    text = ""
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{**row, "blob": b"x"} for row in ROWS]), path)
        return path
    if kind.startswith(("csv", "tsv")):
        mark = "," if kind.startswith("csv") else "\t"
        quoted = [[f'"{value}"' for value in row.values()] for row in ROWS]
        text = "\n".join(mark.join(line) for line in [["url", "caption", "author"], *quoted])
    elif kind.startswith("jsonl"):
        text = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    else:
        text = "\n".join(row["url"] for row in ROWS)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "csv.gz", "tsv", "jsonl", "parquet"])
def test_a_list_gives_its_pictures_with_its_other_columns(kind: str, folder: Path, sharded: Sharded) -> None:
    result = sharded(write_list(folder, kind))
    rows = rows_of(result.corpus)
    assert rows.keys() == {row["url"] for row in ROWS} and result.samples == 4
    for row in ROWS:
        found = rows[row["url"]]
        assert Corpus(result.corpus).read_sample(found) == (folder / row["url"]).read_bytes()
        extra = {} if kind == "txt" else {"caption": row["caption"], "author": "me"}
        assert json.loads(found["metadata"]) == extra
        assert found["uri"] == str(folder / row["url"])
    assert verify(VerifyConfig(corpus=result.corpus, workers=0)).samples == 4


def test_running_a_list_again_does_nothing_and_a_longer_one_appends(folder: Path, sharded: Sharded) -> None:
    path = folder / "list.txt"
    path.write_text("sub/0.png\n./sub/1.png\n\nsub/0.png\n")
    first = sharded(path)
    assert (first.samples, first.ignored, first.version) == (2, 2, 1)
    assert sharded(path).manifest == first.manifest
    path.write_text("sub/0.png\nsub/1.png\nsub/2.png\n")
    second = sharded(path)
    assert (second.samples, second.skipped_units, second.version) == (3, 1, 2)


def test_a_file_of_a_list_that_changed_replaces_its_sample(folder: Path, sharded: Sharded) -> None:
    path = write_list(folder, "csv")
    first = rows_of(sharded(path).corpus)
    (folder / "sub/1.png").write_bytes((folder / "sub/2.png").read_bytes())
    second = rows_of(sharded(path).corpus)
    changed = {name for name in first if first[name]["sha256"] != second[name]["sha256"]}
    assert changed == {"sub/1.png"} and first["sub/1.png"]["key"] == second["sub/1.png"]["key"]


def test_what_cannot_be_had_is_a_row_each_with_its_reason(folder: Path, web: Web, sharded: Sharded) -> None:
    png = (folder / "sub/0.png").read_bytes()
    web.files |= {"/good.png": png, "/late.png": png, "/bad.png": png[:300], "/long.png": png + b"x" * 70_000}
    web.busy |= {"/busy.png": (99, 503, ""), "/late.png": (1, 429, "0")}
    names = ["good", "late", "bad", "long", "busy", "none"]
    addresses = {name: f"{web.url}/{name}.png" for name in names} | {"cut": f"{web.url}/cut"}
    addresses |= {
        "gone": "sub/nine.png",
        "folder": "sub",
        "strange": "nothing://at/all",
        "ftp": "ftp://127.0.0.1/a.png",
        "zip": "zip://a.png",
        "root": str(folder / "sub/3.png"),
    }
    path = folder / "list.jsonl"
    path.write_text("\n".join(json.dumps({"uri": address, "name": name}) for name, address in addresses.items()))
    result = sharded(path, http=OPEN, pixels=PixelPolicy(max_bytes=70_000))
    rows = rows_of(result.corpus)
    statuses = {name: rows[address]["status"] for name, address in addresses.items()}
    assert statuses == {
        "good": "success",
        "late": "success",
        "root": "success",
        "bad": "failed_truncated",
        "long": "rejected_too_large",
        "busy": "failed_http_unavailable",
        "none": "failed_http_404",
        "cut": "failed_http_connection",
        "gone": "failed_missing",
        "folder": "failed_missing",
        "strange": "failed_unsupported_scheme",
        "ftp": "failed_unsupported_scheme",
        "zip": "failed_unsupported_scheme",
    }
    assert rows[addresses["good"]]["input_etag"] == "v1" and rows[addresses["good"]]["input_size"] == len(png)
    assert all(json.loads(rows[address]["metadata"])["name"] == name for name, address in addresses.items())
    assert verify(VerifyConfig(corpus=result.corpus, workers=0)).samples == 3


def test_private_addresses_need_a_flag(folder: Path, web: Web, sharded: Sharded) -> None:
    web.files["/a.png"] = (folder / "sub/0.png").read_bytes()
    path = folder / "list.txt"
    path.write_text(f"{web.url}/a.png\nsub/0.png\n{web.url.replace('http', 'HTTP')}/b.png")
    assert sharded(path).statuses == {"success": 1, "failed_http_address_refused": 2}
    assert not web.requests


def test_a_sha256_in_the_list_is_checked_and_a_new_one_plans_again(folder: Path, web: Web, sharded: Sharded) -> None:
    good = [(folder / f"sub/{number}.png").read_bytes() for number in range(2)]
    web.files |= {"/a.png": good[0], "/b.png": good[0]}
    path = folder / "list.csv"
    digests = [hashlib.sha256(data).hexdigest() for data in good]
    source = SourceConfig(sha256="sha256")
    path.write_text(f"url,sha256\n{web.url}/a.png,{digests[0]}\n{web.url}/b.png,{digests[1]}\n")
    first = sharded(path, http=OPEN, source=source)
    assert first.statuses == {"success": 1, "failed_sha256_mismatch": 1}
    web.files["/a.png"] = good[1]
    path.write_text(f"url,sha256\n{web.url}/a.png,{digests[1]}\n{web.url}/b.png,{digests[1]}\n")
    second = sharded(path, http=OPEN, source=source)
    assert second.statuses == first.statuses and second.version == 2
    assert rows_of(second.corpus)[f"{web.url}/a.png"]["sha256"] == digests[1]


def test_relative_paths_of_a_list_in_a_store_start_there(pictures: list[bytes], sharded: Sharded) -> None:
    storage = Storage.open(f"memory://{uuid.uuid4().hex}/deep")
    storage.publish("sub/a.png", pictures[0])
    storage.publish("lists/all.txt", b"../sub/a.png\nb.png\n")
    storage.publish("lists/b.png", pictures[1])
    result = sharded(f"{storage.url}/lists/all.txt")
    assert result.statuses == {"success": 2}
    assert rows_of(result.corpus)["../sub/a.png"]["uri"] == f"{storage.url}/sub/a.png"


@pytest.mark.parametrize(
    ("base", "address", "whole"),
    [
        ("/data/lists", "a.png", "/data/lists/a.png"),
        ("/data/lists", "../a.png", "/data/a.png"),
        ("/data/lists", "/b/a.png", "/b/a.png"),
        ("/data/lists", "file:///b/a.png", "/b/a.png"),
        ("/data/lists", "s3://b/a.png", "s3://b/a.png"),
        ("s3://b/lists", "x/../a.png", "s3://b/lists/a.png"),
        ("s3://b/lists", "https://c/a.png?x=../y", "https://c/a.png?x=../y"),
        ("s3://b/lists", "HTTPS://C/A.png", "https://C/A.png"),
    ],
)
def test_addresses_are_made_whole(base: str, address: str, whole: str) -> None:
    assert resolve(base, address) == whole


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "place,caption\nx.png,y\n", "source.column"),
        ("a.jsonl", '{"uri": "a.png"}\nno json\n', "Line 2"),
        ("a.jsonl", '[1]\n', "Line 1"),
        ("a.jsonl", '{"uri": 7}\n', "no text"),
        ("a.txt", "\n\n", "names no picture"),
        ("a.parquet", "no parquet", "no Parquet file"),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_understood_are_usage_errors(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        find_inputs(str(tmp_path / name), SourceConfig())


def test_bytes_that_are_no_text_and_missing_lists_are_usage_errors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        find_inputs(str(tmp_path / "a.txt"), SourceConfig())
    for url in (str(tmp_path / "none.csv"), f"memory://{uuid.uuid4().hex}/none.csv"):
        with pytest.raises(UsageError, match="does not exist"):
            find_inputs(url, SourceConfig())


def test_the_named_column_is_taken(folder: Path) -> None:
    (folder / "a.csv").write_text("url,place\nhttp://x/y.png,sub/1.png\n")
    listing = find_inputs(str(folder / "a.csv"), SourceConfig(column="place"))
    (row,) = listing.table.to_pylist()
    assert row["relpath"] == "sub/1.png" and row["size"] == os.path.getsize(folder / "sub/1.png")
    assert json.loads(row["detail"]) == {"metadata": {"url": "http://x/y.png"}}


def test_a_name_of_the_list_that_a_remark_has_gets_a_prefix(folder: Path, sharded: Sharded, tmp_path: Path) -> None:
    Image.new("RGBA", (40, 40)).save(folder / "clear.png")
    (folder / "a.jsonl").write_text(json.dumps({"uri": "clear.png", "had_alpha": "said so", "tags": ["a", 1]}))
    found: dict[str, Any] = json.loads(rows_of(sharded(folder / "a.jsonl").corpus)["clear.png"]["metadata"])
    assert found == {"had_alpha": True, "source_had_alpha": "said so", "tags": ["a", 1]}


def test_only_failures_that_pass_are_tried_again(folder: Path, web: Web, sharded: Sharded) -> None:
    png = (folder / "sub/0.png").read_bytes()
    web.busy["/busy.png"], web.files["/good.png"] = (2, 503, ""), png
    path = folder / "list.txt"
    path.write_text("".join(f"{web.url}/{name}.png\n" for name in ("busy", "good", "none")))
    first = sharded(path, http=OPEN)
    assert first.statuses == {"success": 1, "failed_http_unavailable": 1, "failed_http_404": 1}
    web.files["/busy.png"] = png
    assert sharded(path, http=OPEN).manifest == first.manifest
    second = sharded(path, http=OPEN, retry=True)
    assert second.statuses == {"success": 2, "failed_http_404": 1} and second.version == 2
    assert web.requests == {"/busy.png": 3, "/good.png": 1, "/none.png": 1}
    assert sharded(path, http=OPEN, retry=True).manifest == second.manifest
    assert verify(VerifyConfig(corpus=second.corpus, workers=0)).inputs == 3


def test_a_list_whose_server_was_away_for_all_of_it_can_be_tried_again(
    folder: Path, web: Web, sharded: Sharded
) -> None:
    path = folder / "list.txt"
    path.write_text(f"{web.url}/a.png")
    web.busy["/a.png"] = (2, 503, "")
    web.files["/a.png"] = (folder / "sub/0.png").read_bytes()
    with pytest.raises(PermanentError, match="http_unavailable"):
        sharded(path, http=OPEN)
    assert sharded(path, http=OPEN, retry=True).statuses == {"success": 1}
