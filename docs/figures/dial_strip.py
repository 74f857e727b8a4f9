"""Draw dial.png of docs/method.md: held-back pictures restored at several wishes, and what was measured.

    python docs/figures/dial_strip.py CORPUS VIEW CHECKPOINT docs/figures/dial.png

Pictures are degraded as ``jobs/evaluate.py`` degrades them. The three shown are those on which the dial moves the
measured quality by the lower quartile, the median and the upper quartile among the first 64 held-back ones.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from iqpir.degradation.parameters import degradation_preset, parameters_for_key, scaled
from iqpir.degradation.reference import degrade
from iqpir.pixels import PixelPolicy, decode
from iqpir.restorer import Restorer
from iqpir.training import checkpoint
from pipeline.corpus import Corpus
from pipeline.evaluate import EvaluateConfig
from pipeline.judging.judge import Judge
from pipeline.scoring.calibration import read_calibration
from pipeline.training.checkpoints import fetch_checkpoint
from pipeline.training.feed import Picture, fit_picture
from pipeline.training.shard_cache import ShardCache
from pipeline.view import read_view

WISHES = (0.05, 0.25, 0.45, 0.65, 0.85, 0.95)
SIDE, GAP, CAPTION, FONT = 128, 8, 60, 15


def main(corpus_url: str, view_name: str, checkpoint_url: str, output: str) -> None:
    """Restore, measure, draw; prints the figures and what they are of."""
    defaults = EvaluateConfig(corpus=corpus_url, view=view_name, checkpoint=checkpoint_url)
    corpus, directory = Corpus(corpus_url), fetch_checkpoint(checkpoint_url)
    view, found = read_view(corpus, view_name), checkpoint.load(directory)
    size, cache = found.network_config.image_size, ShardCache(corpus)
    rows = sorted(view.split("val").to_pylist(), key=lambda row: str(row["key"]))[:64]
    originals = [_read(cache, row, size) for row in rows]
    degradation = scaled(degradation_preset(found.metadata["lineage"]["degradation"]), size)
    degraded = [
        degrade(picture, parameters_for_key(degradation, defaults.seed, row["key"]))
        for picture, row in zip(originals, rows, strict=True)
    ]
    restorer = Restorer.load(directory)
    calibration = read_calibration(corpus, view.facts["calibration_name"])
    judge = Judge(calibration, list(calibration.metrics), "cpu", originals)
    ends = [
        judge.measure(list(restorer.restore_batch(degraded, wish))).qualities for wish in WISHES[:: len(WISHES) - 1]
    ]
    order = np.argsort(ends[1] - ends[0])
    strips = []
    for shown in (int(order[len(rows) * quarter // 4]) for quarter in (1, 2, 3)):
        hq, lq = originals[shown], degraded[shown]
        strip = [("degraded", lq), *((f"asked {wish:.2f}", restorer.restore(lq, wish)) for wish in WISHES)]
        strip.append(("original", hq))
        measured = Judge(calibration, list(calibration.metrics), "cpu", [hq] * len(strip)).measure(
            [picture for _, picture in strip]
        )
        captions = [
            [name, f"quality {quality:.2f}", f"{psnr:.1f} dB" if picture is not hq else ""]
            for (name, picture), quality, psnr in zip(strip, measured.qualities, measured.psnrs, strict=True)
        ]
        strips.append(_draw([picture for _, picture in strip], captions))
    sheet = Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips]))
    sheet.save(output, optimize=True)
    moved = f"{ends[0].mean():.2f} to {ends[1].mean():.2f}, median {np.median(ends[1] - ends[0]):.2f}"
    sys.stdout.write(f"mean quality {moved}; {Path(output).stat().st_size} bytes\n")


def _read(cache: ShardCache, row: dict[str, object], size: int) -> Picture:
    data = cache.read(str(row["shard"]), int(str(row["byte_offset"])), int(str(row["byte_size"])))
    return fit_picture(decode(data, PixelPolicy()).array, size, "exact")


def _draw(pictures: list[Picture], captions: list[list[str]]) -> Image.Image:
    """Enlarged pictures side by side on white, captions below."""
    font = ImageFont.load_default(FONT)
    width = len(pictures) * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, SIDE + CAPTION + 2 * GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, lines) in enumerate(zip(pictures, captions, strict=True)):
        left = GAP + number * (SIDE + GAP)
        sheet.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, GAP))
        for row, text in enumerate(lines):
            draw.text((left + SIDE // 2, SIDE + 2 * GAP + row * 19), text, "#1f2328", font, anchor="ma")
    return sheet


if __name__ == "__main__":
    main(*sys.argv[1:])
