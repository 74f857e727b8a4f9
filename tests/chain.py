"""The chain at its smallest: drawn pictures to a corpus, labels, a view, and settings of the stages on it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from iqpir.stages.adversary import AdversaryConfig
from iqpir.stages.stage1 import Stage1Config
from iqpir.stages.stage2 import Stage2Config
from iqpir.training.optimiser import OptimiserConfig
from pipeline.commits.units import SchedulingConfig
from pipeline.curate import CurateConfig, curate
from pipeline.encode import EncodeConfig, encode
from pipeline.label import LabelConfig, label
from pipeline.score import ScoreConfig, score
from pipeline.shard import ShardConfig, shard
from pipeline.sharding.crops import CropPolicy
from pipeline.stage1 import Stage1Training, train_stage1
from pipeline.stage2 import Stage2Training
from pipeline.training.config import TrainResult
from tests.conftest import draw_picture

HERE = SchedulingConfig(workers=0)
"""Units run in this process."""


def write_pictures(folder: Path, count: int, side: int = 64) -> Path:
    """``count`` drawn PNGs, half of them blurred a little, so that their qualities differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        picture = Image.fromarray(draw_picture(seed, side))
        if seed % 2:
            picture = picture.resize((side // 2, side // 2)).resize((side, side))
        picture.save(folder / f"{seed:02d}.png")
    return folder


@dataclass(frozen=True)
class Data:
    """A curated corpus, and trainings on it that take seconds."""

    corpus: str
    view: str
    runs: str
    tracking_uri: str

    def stage1(self, name: str, **changes: Any) -> Stage1Training:
        """Settings of a stage 1 called ``name``."""
        settings: dict[str, Any] = {
            "steps": 12,
            "checkpoint_every": 6,
            "perceptual": "ssim",
            "stage": STAGE1,
        }
        return Stage1Training(**{**self._common(name), **settings, **changes})

    def stage2(self, name: str, stage1: str, **changes: Any) -> Stage2Training:
        """Settings of a stage 2 called ``name`` on the checkpoint or run ``stage1``."""
        settings: dict[str, Any] = {
            "stage1": stage1,
            "steps": 4,
            "checkpoint_every": 2,
            "degradation": "tiny32",
            "stage": STAGE2,
        }
        return Stage2Training(**{**self._common(name), **settings, **changes})

    def _common(self, name: str) -> dict[str, Any]:
        return {
            "corpus": self.corpus,
            "view": self.view,
            "name": name,
            "runs": self.runs,
            "preset": "tiny32",
            "batch_size": 4,
            "log_every": 2,
            "launcher": "local",
            "tracking_uri": self.tracking_uri,
        }


STAGE1 = Stage1Config(
    optimiser=OptimiserConfig(learning_rate=1e-3),
    adversary=AdversaryConfig(weight=0.0),
    codebook_training="ema",
    warmup_steps=2,
    ema_decay=0.99,
    ema_warmup=True,
)
STAGE2 = Stage2Config(
    optimiser=OptimiserConfig(learning_rate=1e-3),
    quality_grad="logits",
    quality_target="match",
    dial_fraction=0.5,
    ema_warmup=True,
)


def make_data(pictures: Path | str, corpus: str, runs: str, tracking_uri: str, name: str = "default") -> Data:
    """Shard in 32-pixel crops, score by the rank network, label and curate with a quarter held back."""
    crops = CropPolicy(size=32, stride=32)
    shard(ShardConfig(input=str(pictures), corpus=corpus, crop=crops, unit_samples=6, workers=0))
    score(ScoreConfig(corpus=corpus, metrics=["rank"], scheduling=HERE))
    return label_and_curate(corpus, runs, tracking_uri, name)


def label_and_curate(corpus: str, runs: str, tracking_uri: str, name: str, **settings: Any) -> Data:
    """Labels and a view, both called ``name``, of a scored corpus."""
    label(LabelConfig(corpus=corpus, name=name, **{"metrics": ["rank"], **settings}))
    view = curate(CurateConfig(corpus=corpus, name=name, labels=name, holdout=0.25, seed=1)).view
    return Data(corpus, view, runs, tracking_uri)


@dataclass(frozen=True)
class Chain:
    """Data, and a finished stage 1 whose codes are cached."""

    folder: Path
    data: Data
    stage1: TrainResult = field(repr=False)

    @property
    def stage1_digest(self) -> str:
        """What codes of the stage 1 are bound to."""
        config = json.loads((Path(self.stage1.checkpoint) / "config.json").read_text())
        return str(config["metadata"]["stage1_digest"])


def make_chain(folder: Path) -> Chain:
    """Everything before stage 2, below ``folder``."""
    pictures = write_pictures(folder / "pictures", 16)
    data = make_data(pictures, str(folder / "corpus"), str(folder / "runs"), f"sqlite:///{folder}/mlflow.db")
    trained = train_stage1(data.stage1("stage1"))
    encode(EncodeConfig(corpus=data.corpus, stage1=trained.run, scheduling=HERE))
    return Chain(folder, data, trained)
