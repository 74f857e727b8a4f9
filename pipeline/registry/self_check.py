"""Prove that a registered model works where this repository is not: same pixels, own code, no pickle.

A clean subprocess (``pipeline/registry/clean_process.py``) downloads the version, loads it and restores golden
pictures; here the answers are compared with the checkpoint's own.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iqpir.errors import VerificationError
from iqpir.pixels import decode, encode_jpeg, encode_png
from iqpir.restorer import Restorer
from pipeline.registry import clean_process

log = logging.getLogger(__name__)

TOLERANCE = 1
"""Largest difference of a pixel, 0 to 255."""
DEADLINE_SECONDS = 1800
BROKEN = b"these bytes are no picture"


@dataclass(frozen=True)
class Case:
    """One call of the model."""

    name: str
    quality: float
    fidelity: float


def check_version(model_uri: str, tracking_uri: str, package: str, checkpoint: Path) -> int:
    """Run the self-check of ``models:/name/version``.

    Args:
        model_uri: the version.
        tracking_uri: where it is registered.
        package: name of its vendored code.
        checkpoint: what it was made from.

    Returns:
        largest difference of a pixel between the registered model and the checkpoint.

    Raises:
        VerificationError: it does not load, runs other code, answers otherwise, or accepts a broken row.
    """
    restorer = Restorer.load(checkpoint, device="cpu")
    cases = [Case("high", 0.95, 0.0), Case("low", 0.25, 0.5 if restorer.takes_fidelity else 0.0)]
    pictures = golden_pictures(restorer.image_size)
    with tempfile.TemporaryDirectory(prefix="iqpir-self-check-") as name:
        folder = Path(name)
        _write_requests(folder, pictures, cases)
        report = _run(model_uri, tracking_uri, folder)
        _check_origin(report, model_uri, package)
        return max(_compare(model_uri, folder, case, restorer, pictures, report["errors"][case.name]) for case in cases)


def golden_pictures(side: int) -> dict[str, bytes]:
    """Three requests by name: a square PNG, a JPEG that needs tiles, and bytes that are no picture.

    Args:
        side: ``image_size`` of the network.
    """
    return {
        "square.png": encode_png(_drawn(side, side)),
        "tiles.jpg": encode_jpeg(_drawn(side + side // 2, side + side // 4)),
        "broken.png": BROKEN,
    }


def _drawn(height: int, width: int) -> NDArray[np.uint8]:
    """Gradients, edges and grain, always the same: uint8 RGB [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([255 * x / width, 255 * y / height, 127 + 127 * np.sin(x / 5)], axis=-1)
    base[(x // 8 + y // 8) % 4 == 0] *= 0.5
    grain = np.random.default_rng(2603).normal(0, 8, base.shape)
    picture: NDArray[np.uint8] = (base + grain).clip(0, 255).astype(np.uint8)
    return picture


def _write_requests(folder: Path, pictures: dict[str, bytes], cases: list[Case]) -> None:
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    requests = [
        {
            "name": case.name,
            "pictures": list(pictures),
            "params": {"quality": case.quality, "fidelity": case.fidelity},
        }
        for case in cases
    ]
    (folder / "request.json").write_text(json.dumps(requests), encoding="utf-8")


def _run(model_uri: str, tracking_uri: str, folder: Path) -> dict[str, Any]:
    """The report of the clean process, on the CPU with as many threads as here: equal arithmetic."""
    environment = {
        **os.environ,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", str(Path(clean_process.__file__)), model_uri, tracking_uri, str(folder)]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise VerificationError(f"{model_uri} did not answer within {DEADLINE_SECONDS} s.") from error
    if done.returncode:
        log.warning("self-check of %s:\n%s", model_uri, done.stderr.strip())
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise VerificationError(f"{model_uri} does not run in a clean process: {last}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def _check_origin(report: dict[str, Any], model_uri: str, package: str) -> None:
    if report["packages"] != [package] or f"{package}.restorer" not in report["modules"]:
        raise VerificationError(f"{model_uri} carries {report['packages']}, not {package}.")
    if report["elsewhere"] or report["hidden"]:
        raise VerificationError(
            f"{model_uri} runs code from elsewhere: {', '.join(report['elsewhere'] + report['hidden'])}."
        )


def _compare(
    model_uri: str,
    folder: Path,
    case: Case,
    restorer: Restorer,
    pictures: dict[str, bytes],
    errors: list[str | None],
) -> int:
    """Largest difference over the pictures of one case."""
    largest = 0
    for (name, data), error in zip(pictures.items(), errors, strict=True):
        answer = folder / f"{case.name}-{name}.png"
        if data == BROKEN:
            if error is None or answer.exists():
                raise VerificationError(f"{model_uri} gives no error for bytes that are no picture.")
            continue
        if error is not None:
            raise VerificationError(f"{model_uri} cannot restore {name}: {error}")
        ours = decode(restorer.restore(data, quality=case.quality, fidelity=case.fidelity)).array
        theirs = decode(answer.read_bytes()).array
        if ours.shape != theirs.shape:
            raise VerificationError(f"{model_uri} gives {theirs.shape} for {name}, the checkpoint {ours.shape}.")
        largest = max(largest, int(np.abs(ours.astype(int) - theirs.astype(int)).max()))
    if largest > TOLERANCE:
        raise VerificationError(f"{model_uri} differs from its checkpoint by {largest} of 255 ({case.name}).")
    return largest
