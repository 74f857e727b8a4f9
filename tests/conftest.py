"""What every test shares: one source of randomness, drawn pictures, a clean environment, one Ray."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from tests.chain import Chain


RAY_FIXTURES = frozenset({"local_ray", "chain"})
SLOW_FOLDERS = {Path(__file__).parent / name for name in ("bench", "chaos")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal tests out to processes: all that share the session's Ray to one, of the others a file to one.

    What shares Ray comes first, because it takes longest and is one piece. Chaos and benches are slow as a whole.
    """

    def shares_ray(item: pytest.Item) -> bool:
        return not RAY_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))

    shared = {item.path for item in items if shares_ray(item)}
    items.sort(key=lambda item: item.path not in shared)
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.path in shared else str(item.path)))
        if item.path.parent in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No workspace, server or credential of the machine reaches a test."""
    monkeypatch.setenv("IQPIR_WORKSPACE", str(tmp_path / "iqpir-workspace"))
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_")):
            monkeypatch.delenv(name)


@pytest.fixture
def rng() -> np.random.Generator:
    """The only source of randomness of a test."""
    return np.random.default_rng(2603)


def draw_picture(seed: int, side: int = 64) -> NDArray[np.uint8]:
    """A picture with edges, gradients and texture: uint8 RGB [side, side, 3], a function of ``seed``."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, side)
    base = random.uniform(40, 200, 3) + 50 * (ramp[:, None, None] * random.uniform(-1, 1, 3))
    picture = np.broadcast_to(base, (side, side, 3)) + random.normal(0, 6, (side, side, 1))
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, r = random.uniform(0, side), random.uniform(0, side), random.uniform(side / 16, side / 4)
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        if random.random() < 0.5:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        else:
            draw.line((x - r, y - r, x + r, y + r), fill=colour, width=max(1, side // 32))
    return np.asarray(image)


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """A folder of eight drawn 64x64 PNGs in two subfolders."""
    folder = tmp_path / "pictures"
    for seed in range(8):
        path = folder / ("even" if seed % 2 == 0 else "odd") / f"{seed:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_picture(seed)).save(path)
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for the whole session; starting one costs ten seconds and more."""
    import ray

    from pipeline.cluster import ensure_ray

    ensure_ray(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> "Chain":
    """A small curated corpus with a trained, encoded stage 1; tests add runs to it and change none."""
    from tests.chain import make_chain

    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("IQPIR_WORKSPACE", str(folder))
        return make_chain(folder)
