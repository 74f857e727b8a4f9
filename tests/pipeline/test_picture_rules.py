import io
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iqpir.errors import UsageError
from iqpir.pixels import decode
from pipeline.corpus import Corpus
from pipeline.shard import ShardConfig, shard
from pipeline.sharding.crops import CropPolicy
from pipeline.sharding.picture_rules import RejectPolicy, ResizePolicy, TilePolicy, flat_share, shrunk, tile_windows
from pipeline.verify import VerifyConfig, verify
from tests.conftest import draw_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "in"
    path.mkdir()
    Image.fromarray(draw_picture(1, 64)).save(path / "square.png")
    Image.fromarray(draw_picture(2, 128)[:40]).save(path / "wide.png")
    half = draw_picture(3, 64).copy()
    half[:, :40] = 77
    Image.fromarray(half).save(path / "half.png")
    return path


def statuses(folder: Path, **options: object) -> dict[str, str]:
    corpus = str(folder.parent / "corpus")
    shard(ShardConfig(input=str(folder), corpus=corpus, workers=0, **options))  # type: ignore[arg-type]
    found = Corpus(corpus)
    return {row["relpath"]: row["status"] for unit in found.manifest().units for row in found.rows(unit).to_pylist()}


def test_elongated_pictures_are_rejected(folder: Path) -> None:
    found = statuses(folder, reject=RejectPolicy(max_aspect=3))
    assert found == {"square.png": "success", "half.png": "success", "wide.png": "rejected_aspect_ratio"}


def test_the_aspect_limit_is_inclusive(folder: Path) -> None:
    assert set(statuses(folder, reject=RejectPolicy(max_aspect=3.2)).values()) == {"success"}


def test_pictures_with_flat_regions_are_rejected(folder: Path) -> None:
    found = statuses(folder, reject=RejectPolicy(max_flat=0.4))
    assert found == {"square.png": "success", "half.png": "rejected_flat_regions", "wide.png": "success"}


def test_the_share_of_flat_blocks_is_counted() -> None:
    picture = draw_picture(1, 64).copy()
    picture[:32, :32] = (200, 10, 10)
    assert flat_share(picture, 16, 2.0) == pytest.approx(4 / 16)
    assert flat_share(picture[:40, :40], 16, 2.0) == 1.0
    assert flat_share(picture[:8], 16, 2.0) == 0.0


@pytest.mark.parametrize(
    ("policy", "size"),
    [
        (ResizePolicy(max_side=40), (40, 20)), (ResizePolicy(side=20), (40, 20)), (ResizePolicy(max_side=80), None),
        (ResizePolicy(side=41), None), (ResizePolicy(), None), (ResizePolicy(max_side=79), (79, 40)),
    ],
)  # fmt: skip
def test_pictures_are_shrunk_and_never_enlarged(policy: ResizePolicy, size: tuple[int, int] | None) -> None:
    result = shrunk(draw_picture(1, 80)[:40], policy)
    assert (None if result is None else result.shape[1::-1]) == size


def test_a_resized_picture_is_a_png_and_a_small_one_its_own_bytes(folder: Path) -> None:
    statuses(folder, resize=ResizePolicy(max_side=100))
    corpus = Corpus(str(folder.parent / "corpus"))
    rows = {row["relpath"]: row for row in corpus.samples().to_pylist()}
    assert corpus.read_sample(rows["square.png"]) == (folder / "square.png").read_bytes()
    wide = rows["wide.png"]
    data = corpus.read_sample(wide)
    assert (wide["width"], wide["height"], wide["original_width"], wide["member"][-4:]) == (100, 31, 128, ".png")
    image = Image.open(folder / "wide.png").resize((100, 31), Image.Resampling.LANCZOS)
    assert np.array_equal(decode(data).array, np.asarray(image))


@pytest.mark.parametrize(("width", "height", "size", "overlap"), [(100, 64, 32, 0), (101, 70, 32, 8), (20, 90, 32, 31)])
def test_tiles_cover_the_picture_with_the_overlap(width: int, height: int, size: int, overlap: int) -> None:
    windows = tile_windows(width, height, TilePolicy(size=size, overlap=overlap))
    seen = np.zeros((height, width), int)
    for x, y in windows:
        assert x + min(size, width) <= width and y + min(size, height) <= height
        seen[y : y + size, x : x + size] += 1
    assert seen.min() == 1 or overlap
    assert (seen > 0).all() and len(set(windows)) == len(windows)
    rows, columns = sorted({y for _, y in windows}), sorted({x for x, _ in windows})
    for starts in (rows, columns):
        assert all(0 < right - left <= size - overlap for left, right in itertools.pairwise(starts))


def test_tiles_are_samples_and_small_pictures_stay_whole(folder: Path) -> None:
    Image.fromarray(draw_picture(5, 32)).save(folder / "small.jpg")
    statuses(folder, tile=TilePolicy(size=48, overlap=16))
    corpus = Corpus(str(folder.parent / "corpus"))
    rows = corpus.samples().to_pylist()
    assert verify(VerifyConfig(corpus=str(folder.parent / "corpus"), workers=0)).samples == len(rows) == 1 + 4 + 4 + 4
    for row in rows:
        if row["relpath"] == "small.jpg":
            assert corpus.read_sample(row) == (folder / "small.jpg").read_bytes() and row["crop_x"] is None
            continue
        whole = np.asarray(Image.open(folder / row["relpath"]))
        x, y = row["crop_x"], row["crop_y"]
        part = decode(corpus.read_sample(row)).array
        assert np.array_equal(part, whole[y : y + 48, x : x + 48]) and part.shape[:2] == (row["height"], row["width"])


def test_pictures_are_resized_before_they_are_cut(folder: Path) -> None:
    statuses(folder, resize=ResizePolicy(side=32), crop=CropPolicy(size=32))
    corpus = Corpus(str(folder.parent / "corpus"))
    rows = [row for row in corpus.samples().to_pylist() if row["relpath"] == "square.png"]
    assert [(row["width"], row["crop_x"], row["original_width"]) for row in rows] == [(32, 0, 64)]
    image = Image.open(folder / "square.png").resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(corpus.read_sample(rows[0])))), np.asarray(image))


def test_rules_that_do_nothing_leave_the_settings_as_they_were() -> None:
    plain = ShardConfig(input="a", corpus="b").settings
    assert not {"tile", "resize", "reject"} & plain.keys()
    assert ShardConfig(input="a", corpus="b", tile=TilePolicy(size=8)).settings == {
        **plain,
        "tile": {"size": 8, "overlap": 0},
    }


def test_another_rule_is_refused_by_its_name(folder: Path) -> None:
    statuses(folder, reject=RejectPolicy(max_aspect=3))
    with pytest.raises(UsageError, match=r"planned with reject\.max_aspect = 3, now it is 4"):
        statuses(folder, reject=RejectPolicy(max_aspect=4))
    with pytest.raises(UsageError, match=r"planned with reject\."):
        statuses(folder)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RejectPolicy(max_aspect=0.5), lambda: RejectPolicy(max_flat=2), lambda: RejectPolicy(flat_block=1),
        lambda: ResizePolicy(side=-1), lambda: ResizePolicy(side=8, max_side=9), lambda: TilePolicy(size=8, overlap=8),
        lambda: TilePolicy(overlap=1), lambda: TilePolicy(size=-1),
        lambda: ShardConfig(input="a", corpus="b", tile=TilePolicy(size=8), crop=CropPolicy(size=8)),
    ],
)  # fmt: skip
def test_policies_without_sense_are_usage_errors(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        make()
