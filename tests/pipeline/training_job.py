"""A stage's job in a process of its own, to be stopped and started again."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from iqpir.training.checkpoint import MANIFEST
from pipeline.training.config import Training

JOBS = Path(__file__).parents[2] / "jobs"


class Job:
    """The job of one configuration."""

    def __init__(self, training: Training, folder: Path) -> None:
        recipe = folder / "recipe.json"
        recipe.write_text(json.dumps(dataclasses.asdict(training)))
        self.run = Path(training.run_url)
        self.said = ""
        self.command = [sys.executable, str(JOBS / f"{training.stage_name}.py"), "--config", str(recipe)]

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )

    def finish(self, process: subprocess.Popen[str], code: int) -> dict[str, Any]:
        out, self.said = process.communicate(timeout=200)
        assert process.returncode == code, self.said
        (line,) = out.splitlines()
        result: dict[str, Any] = json.loads(line)
        return result

    def wait_for_checkpoint(self, process: subprocess.Popen[str], attempt: int = 1) -> None:
        while not any(self.run.glob(f"checkpoints/step_*-a{attempt}/{MANIFEST}")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
