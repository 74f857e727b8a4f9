"""Copies are found whatever was done to their bytes, the best one stays, and no cluster is split."""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iqpir.errors import UsageError, VerificationError
from iqpir.pixels import PixelPolicy
from pipeline.commits.units import SchedulingConfig
from pipeline.corpus import Corpus
from pipeline.curate import CurateConfig, curate, linked
from pipeline.dedup import DedupConfig, DedupResult, dedup, read_dedup
from pipeline.duplicates.hashes import hash_picture
from pipeline.duplicates.samples import HashedSamples, LikenessPolicy, join_samples
from pipeline.gc import GcConfig, gc
from pipeline.label import LabelConfig, label, read_label_index, read_labels
from pipeline.layout import DEDUP
from pipeline.score import ScoreConfig, score
from pipeline.shard import ShardConfig, shard
from pipeline.verify import VerifyConfig, verify
from pipeline.view import read_view

ALONE = SchedulingConfig(workers=0)
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
COPIES = ("again", "pixels", "jpeg", "half", "webp")
"""Copies of the first photograph: by bytes, by pixels, and three that only look alike."""


def _bytes(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photographs, copies of the first, two plain pictures; scored and labelled."""
    folder = tmp_path_factory.mktemp("dedup")
    source = folder / "pictures"
    source.mkdir()
    for number, name in enumerate(PHOTOGRAPHS):
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB").crop((0, 0, 256, 256))
        (source / f"{number}-original.png").write_bytes(_bytes(image, "PNG"))
        if number:
            continue
        half = image.resize((128, 128), Image.Resampling.BICUBIC)
        (source / "0-again.png").write_bytes(_bytes(image, "PNG"))
        (source / "0-pixels.bmp").write_bytes(_bytes(image, "BMP"))
        (source / "0-jpeg.jpg").write_bytes(_bytes(image, "JPEG", quality=40))
        (source / "0-half.png").write_bytes(_bytes(half, "PNG"))
        (source / "0-webp.webp").write_bytes(_bytes(image, "WEBP", quality=50))
    for number, grey in enumerate((40, 200)):
        (source / f"plain-{number}.png").write_bytes(_bytes(Image.new("RGB", (64, 64), (grey,) * 3), "PNG"))
    url = str(folder / "corpus")
    shard(ShardConfig(input=str(source), corpus=url, unit_samples=4, workers=0))
    score(ScoreConfig(corpus=url, metrics=["rank"], scheduling=ALONE))
    label(LabelConfig(corpus=url, metrics=["rank"]))
    return folder / "corpus"


@pytest.fixture
def corpus(made: Path, tmp_path: Path) -> Corpus:
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "corpus")
    return Corpus(str(tmp_path / "corpus"))


def _dedup(corpus: Corpus, **changed: object) -> DedupResult:
    return dedup(DedupConfig(corpus=corpus.storage.url, **{"scheduling": ALONE, **changed}))  # type: ignore[arg-type]


def _by_name(corpus: Corpus, name: str = "default") -> dict[str, dict[str, object]]:
    """Stem of the file -> its row."""
    table = read_dedup(corpus, name)[1].join(corpus.samples(["key", "relpath"]), "key")
    return {Path(row["relpath"]).stem: row for row in table.to_pylist()}


def test_copies_are_one_cluster_and_other_pictures_are_alone(corpus: Corpus) -> None:
    result = _dedup(corpus, keep="first")
    rows = _by_name(corpus)
    names = ["0-original", *(f"0-{copy}" for copy in COPIES)]
    cluster = {rows[name]["cluster"] for name in names}
    assert cluster == {min(str(rows[name]["key"]) for name in names)}
    assert {rows[name]["cluster_size"] for name in names} == {6}
    others = [row for name, row in rows.items() if name not in names]
    assert len(others) == 5 and all(row["cluster"] == row["key"] and row["cluster_size"] == 1 for row in others)
    assert (result.samples, result.clusters, result.clustered, result.largest) == (11, 1, 6, 6)
    assert result.duplicates == 5 and result.flat == 2 and result.unhashed == 0
    verify(VerifyConfig(corpus=corpus.storage.url))


def test_the_best_one_stays_and_the_others_say_why_they_go(corpus: Corpus) -> None:
    _dedup(corpus)
    rows = _by_name(corpus)
    labels = read_labels(corpus, read_label_index(corpus, "default"))
    quality = dict(zip(labels["key"].to_pylist(), labels["quality"].to_pylist(), strict=True))
    names = ["0-original", *(f"0-{copy}" for copy in COPIES)]
    kept = [name for name in names if rows[name]["duplicate_of"] is None]
    assert len(kept) == 1
    best = max(quality[rows[name]["key"]] for name in names)
    assert quality[rows[kept[0]]["key"]] == best
    assert {rows[name]["duplicate_of"] for name in names} == {None, rows[kept[0]]["key"]}
    assert rows[kept[0]]["match"] is None
    assert {rows[name]["match"] for name in ("0-jpeg", "0-half", "0-webp")} - {None} == {"perceptual"}


def test_without_perception_only_equal_bytes_and_pixels_join(corpus: Corpus) -> None:
    result = _dedup(corpus, name="exact", keep="first", likeness=LikenessPolicy(perceptual=False))
    rows = _by_name(corpus, "exact")
    trio = [rows[name] for name in ("0-original", "0-again", "0-pixels")]
    assert len({row["cluster"] for row in trio}) == 1 and result.clustered == 3
    assert sum(result.matches.values()) == 2 and result.matches["perceptual"] == 0
    assert {rows[name]["cluster_size"] for name in ("0-jpeg", "0-half", "0-webp")} == {1}


def test_hashes_are_made_once_and_equal_settings_write_nothing(corpus: Corpus) -> None:
    first = _dedup(corpus, keep="first")
    before = {entry.path: entry.etag for entry in corpus.storage.list()}
    assert _dedup(corpus, keep="first") == first
    assert {entry.path: entry.etag for entry in corpus.storage.list("hashes")} == {
        path: etag for path, etag in before.items() if path.startswith("hashes/")
    }
    assert {entry.path for entry in corpus.storage.list()} == set(before)
    with pytest.raises(UsageError, match="other duplicates called default"):
        _dedup(corpus, keep="first", likeness=LikenessPolicy(distance=0))
    assert _dedup(corpus, name="all", keep="all").duplicates == 0
    assert len(corpus.storage.list("hashes")) == sum(path.startswith("hashes/") for path in before)


def test_the_tables_have_the_stated_form_and_a_damaged_one_is_found(corpus: Corpus) -> None:
    _dedup(corpus, keep="first")
    assert read_dedup(corpus, "default")[1].schema.equals(DEDUP)
    assert gc(GcConfig(corpus=corpus.storage.url, grace_hours=0)).orphans == 0
    for prefix in ("dedup", "hashes"):
        path = next(entry.path for entry in corpus.storage.list(prefix) if entry.path.endswith(".parquet"))
        file = Path(corpus.storage.url) / path
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + b"x")
        with pytest.raises(VerificationError, match=prefix):
            verify(VerifyConfig(corpus=corpus.storage.url))
        file.write_bytes(whole)


def test_a_sample_that_the_policy_refuses_is_compared_by_its_bytes(corpus: Corpus) -> None:
    result = _dedup(corpus, name="small", keep="first", pixels=PixelPolicy(max_pixels=100))
    assert result.unhashed == result.samples == 11
    assert result.clustered == 2 and result.matches == {"bytes": 1, "pixels": 0, "perceptual": 0}


@pytest.mark.slow
def test_workers_on_ray_give_the_same_tables(corpus: Corpus, local_ray: None) -> None:
    shutil.copytree(corpus.storage.url, f"{corpus.storage.url}-ray")
    other = Corpus(f"{corpus.storage.url}-ray")
    here = _dedup(corpus, keep="first")
    there = dedup(DedupConfig(corpus=other.storage.url, keep="first", scheduling=SchedulingConfig(workers=2)))
    assert here.digest == there.digest


def test_a_view_leaves_duplicates_out_where_it_is_told_of_them(corpus: Corpus) -> None:
    _dedup(corpus)
    url = corpus.storage.url
    plain = curate(CurateConfig(corpus=url, name="plain"))
    thinned = curate(CurateConfig(corpus=url, name="thinned", dedup="default"))
    assert (plain.samples, plain.duplicates) == (11, 0)
    assert (thinned.samples, thinned.duplicates) == (6, 5)
    view = read_view(corpus, thinned.view)
    assert view.table["duplicate_of"].null_count == 6
    assert view.facts["dedup"] == "default" and len(view.facts["dedup_digest"]) == 12
    assert "dedup" not in read_view(corpus, plain.view).facts
    where = "cluster_size > 1 and (match is null or match <> 'perceptual')"
    whole = curate(CurateConfig(corpus=url, name="whole", dedup="default", drop_duplicates=False, where=where))
    assert whole.samples == 1 + sum(row["match"] in ("bytes", "pixels") for row in _by_name(corpus).values())
    verify(VerifyConfig(corpus=url))


@pytest.mark.parametrize("seed", range(6))
def test_copies_lie_on_one_side_of_the_split_though_none_is_dropped(corpus: Corpus, seed: int) -> None:
    _dedup(corpus, keep="all")
    settings = {"holdout": 0.5, "seed": seed, "dedup": "default", "drop_duplicates": False}
    view = read_view(corpus, curate(CurateConfig(corpus=corpus.storage.url, name="v", **settings)).view)  # type: ignore[arg-type]
    sides: dict[str, set[str]] = {}
    for row in view.table.to_pylist():
        sides.setdefault(row["cluster"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert set().union(*sides.values()) == {"train", "val"}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 9) | st.none()), max_size=40))
def test_sources_that_a_chain_of_clusters_ties_together_are_one_group(samples: list[tuple[int, int | None]]) -> None:
    sources = [f"s{source:02d}" for source, _ in samples]
    clusters = [None if cluster is None else f"c{cluster}" for _, cluster in samples]
    names = sorted(set(sources))
    numbers = np.array([names.index(source) for source in sources], np.int64)
    roots = linked(numbers, pa.chunked_array([pa.array(clusters, pa.string())]))
    groups = {name: names[root] for name, root in zip(names, roots.tolist(), strict=True)}
    for one, cluster in zip(sources, clusters, strict=True):
        for two, other in zip(sources, clusters, strict=True):
            if cluster is not None and cluster == other:
                assert groups[one] == groups[two]
    reach = {source: {source} for source in sources}
    for _ in range(len(reach)):
        for source, members in reach.items():
            shared = {c for s, c in zip(sources, clusters, strict=True) if s in members and c is not None}
            reach[source] |= {s for s, c in zip(sources, clusters, strict=True) if c in shared}
    assert groups == {source: min(members) for source, members in reach.items()}


def test_a_corpus_that_has_grown_needs_a_new_search(corpus: Corpus, tmp_path: Path) -> None:
    _dedup(corpus, keep="first")
    more = tmp_path / "more"
    more.mkdir()
    image = Image.open(Path(skimage.__file__).parent / "data/coffee.png").convert("RGB").crop((20, 20, 276, 276))
    (more / "new.png").write_bytes(_bytes(image, "PNG"))
    shard(ShardConfig(input=str(more), corpus=corpus.storage.url, collection="more", unit_samples=4, workers=0))
    grown = Corpus(corpus.storage.url)
    with pytest.raises(UsageError, match="another state of the corpus"):
        curate(CurateConfig(corpus=grown.storage.url, name="v", dedup="default"))
    hashes = len(grown.storage.list("hashes"))
    assert _dedup(grown, name="grown", keep="first").samples == 12
    assert len(grown.storage.list("hashes")) == hashes + 1


def test_unknown_names_and_labels_say_what_there_is(corpus: Corpus) -> None:
    _dedup(corpus, keep="first")
    with pytest.raises(UsageError, match="Known: default"):
        curate(CurateConfig(corpus=corpus.storage.url, name="v", dedup="defualt"))
    before = {entry.path for entry in corpus.storage.list()}
    with pytest.raises(UsageError, match="Known: default"):
        _dedup(corpus, labels="absent", name="other")
    assert {entry.path for entry in corpus.storage.list()} == before
    with pytest.raises(UsageError, match="distance 40"):
        LikenessPolicy(distance=40)


def test_equal_hashes_join_only_where_thumbnails_are_alike_and_there_is_contrast() -> None:
    count = 5
    thumbnails = np.full((count, 192), 10, np.uint8)
    thumbnails[2] = 200
    samples = HashedSamples(
        keys=np.array([b"a", b"b", b"c", b"d", b"e"]),
        bytes=np.array([b"1", b"2", b"3", b"4", b"5"]),
        pixels=np.array([b"1", b"2", b"3", b"4", b"5"]),
        phash=np.array([7, 7, 7, 7, (1 << 20) - 1], np.uint64),
        contrast=np.array([30, 30, 30, 0.5, 30], np.float32),
        place=np.arange(count),
        thumbnails=thumbnails,
    )
    assert join_samples(samples, LikenessPolicy())[0].tolist() == [0, 0, 2, 3, 4]
    assert join_samples(samples, LikenessPolicy(thumbnail_difference=255))[0].tolist() == [0, 0, 0, 3, 4]
    assert join_samples(samples, LikenessPolicy(min_contrast=0))[0].tolist() == [0, 0, 2, 0, 4]
    assert join_samples(samples, LikenessPolicy(distance=17))[0].tolist() == [0, 0, 2, 3, 0]


def test_pictures_with_equal_hashes_and_other_colours_differ_in_the_thumbnail() -> None:
    grey = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 1, 3))
    red = grey * np.array([1, 0, 0], np.uint8)
    one, two = hash_picture(grey), hash_picture(np.clip(red.astype(int) * 2, 0, 255).astype(np.uint8))
    assert one.pixel_digest != two.pixel_digest
    difference = np.abs(np.frombuffer(one.thumbnail, np.uint8).astype(int) - np.frombuffer(two.thumbnail, np.uint8))
    assert difference.mean() > 6
    assert len(one.phash) == 8 and len(one.thumbnail) == 192 and one.contrast > 2
