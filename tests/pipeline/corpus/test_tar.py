import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iqpir.errors import UsageError
from pipeline.sharding.crops import CropPolicy, choose_windows, cut
from pipeline.sharding.tar import TarError, TarWriter, read_members


def write(path: Path, members: dict[str, bytes]) -> list[int]:
    with TarWriter(path) as tar:
        offsets = [tar.add(name, data) for name, data in members.items()]
    assert tar.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    return offsets


MEMBERS = {"0a.png": b"p" * 700, "0a.json": b"{}", "0b.png": b"", "0b.json": b"j" * 512}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.dictionaries(st.from_regex(r"[a-f0-9]{4}\.png", fullmatch=True), st.binary(max_size=2000), max_size=6)
)
def test_any_reader_finds_what_was_written_where_it_was_written(members: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.unlink(missing_ok=True)
    offsets = write(path, members)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        assert {info.name: tar.extractfile(info).read() for info in tar} == members  # type: ignore[union-attr]
    found = list(read_members(io.BytesIO(data)))
    assert [(member.name, member.offset) for member in found] == list(zip(members, offsets, strict=True))
    for member in found:
        assert data[member.offset : member.offset + member.size] == members[member.name]
        assert member.sha256 == hashlib.sha256(members[member.name]).hexdigest()


def test_the_same_members_are_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", MEMBERS)
    write(tmp_path / "b", MEMBERS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a", MEMBERS)
    data = (tmp_path / "a").read_bytes()
    for length in range(0, len(data), 64):
        with pytest.raises(TarError):
            list(read_members(io.BytesIO(data[:length])))


def test_a_flipped_bit_outside_the_contents_is_noticed(tmp_path: Path) -> None:
    offsets = write(tmp_path / "a", MEMBERS)
    data = (tmp_path / "a").read_bytes()
    inside = {
        position
        for start, content in zip(offsets, MEMBERS.values(), strict=True)
        for position in range(start, start + len(content))
    }
    for position in set(range(0, len(data), 7)) - inside:
        broken = bytearray(data)
        broken[position] ^= 1
        with pytest.raises(TarError):
            list(read_members(io.BytesIO(broken)))


@pytest.mark.parametrize("kind", ["two tars", "link", "zeros and more"])
def test_foreign_tars_are_refused(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "a", MEMBERS)
    data = (tmp_path / "a").read_bytes()
    if kind == "two tars":
        data += data
    if kind == "zeros and more":
        data += b"\0" * 512
    if kind == "link":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            info = tarfile.TarInfo("0a.png")
            info.type, info.linkname = tarfile.SYMTYPE, "../../etc/passwd"
            tar.addfile(info)
        data = buffer.getvalue()
    with pytest.raises(TarError):
        list(read_members(io.BytesIO(data)))


def test_a_tar_whose_writer_failed_has_no_end(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TarWriter(tmp_path / "a") as tar:
        tar.add("0a.png", b"x")
        raise RuntimeError
    with pytest.raises(TarError), (tmp_path / "a").open("rb") as file:
        list(read_members(file))


@settings(max_examples=50, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    stride=st.integers(0, 40),
    limit=st.integers(0, 9),
    std=st.sampled_from([0.0, 20.0]),
)
def test_crops_lie_in_the_picture_are_enough_and_do_not_depend_on_chance(
    height: int, width: int, stride: int, limit: int, std: float
) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture[:, : width // 2] = 7
    policy = CropPolicy(size=16, stride=stride, per_picture=limit, min_std=std)
    windows = choose_windows(picture, "key", policy)
    assert windows == choose_windows(picture.copy(), "key", policy)
    assert windows == sorted(set(windows), key=lambda window: (window.y, window.x))
    for window in windows:
        crop = cut(picture, window, 16)
        assert crop.shape == (16, 16, 3)
        assert std == 0.0 or crop.mean(axis=2).std() > 10
    everything = choose_windows(picture, "key", CropPolicy(size=16, stride=stride, min_std=std))
    assert len(windows) == (min(limit, len(everything)) if limit else len(everything))
    assert set(windows) <= set(everything)


@pytest.mark.parametrize("options", [{"stride": 8}, {"size": -1}, {"size": 8, "min_std": 200.0}])
def test_crop_policies_without_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="crop"):
        CropPolicy(**options)  # type: ignore[arg-type]
