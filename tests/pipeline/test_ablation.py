"""Ablations: what the statistics say, that a run is made once, and that variants differ in what they name only."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from iqpir.errors import UsageError
from pipeline.ablation import AblationConfig, Comparison, Variant, ablation, code_digest
from pipeline.ablations.charts import figures
from pipeline.ablations.row import Row, read_row, write_row
from pipeline.ablations.table import interval, paired, tables
from pipeline.storage import Storage
from tests.chain import write_pictures
from tests.source_files import REPOSITORY

FIGURES = ("quality", "outside", "psnr", "ssim", "quality_spearman", "quality_range", "outside_spearman")
SHORT = {"steps": 3, "batch_size": 2, "log_every": 3, "checkpoint_every": 3, "launcher": "local"}


def row(variant: str, seed: int, psnr: float) -> Row:
    values = dict.fromkeys((*FIGURES, "outside_range", "rank"), 0.5) | {"psnr": psnr}
    values |= {"best_quality": 0.8 if variant == "a" else 0.4 + seed / 10, "best_outside": 0.3}
    base = {"quality": 0.2, "outside": 0.3, "rank": 0.4}
    curves = {"quality": [0.1, 0.2, 0.3], "outside": [0.1, 0.1, 0.2], "psnr": [30.0, 29.0, psnr]}
    curves |= {"rank": [0.2, 0.2, 0.6], "ssim": [0.7, 0.7, 0.6]}
    return Row(
        variant=variant,
        seed=seed,
        figures=values,
        bases={"lq": {**base, "psnr": 31.0, "ssim": 0.8}, "hq": base},
        dial=[0.05, 0.5, 0.95],
        curves=curves,
        training={"quality": 0.5, "rank": 0.6},
        commit="c0ffee",
        machine={"cpus": "2"},
    )


ROWS = [row("a", 1, 25.0), row("a", 2, 27.0), row("b", 2, 20.0), row("b", 1, 20.5)]


def test_an_interval_is_students() -> None:
    """Three values of deviation 1: 4.3027 / sqrt(3), from the table of Student's t at 2 degrees of freedom."""
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2.0)
    assert found.half == pytest.approx(4.302653 / 3**0.5, abs=1e-5)


def test_differences_are_taken_seed_by_seed() -> None:
    assert paired(ROWS, "a", "b", "psnr") == [4.5, 7.0]
    assert paired(ROWS[:3], "a", "b", "psnr") == [7.0], "a seed that one of them lacks is left out"


def test_a_difference_is_bold_only_where_its_interval_leaves_zero_out() -> None:
    assert interval([1.0, 1.1]).text(2, sign=True) == "**+1.05 ± 0.64**"
    assert interval([-1.0, 1.1]).text(2, sign=True) == "+0.05 ± 13.34"


def test_the_table_has_each_variant_its_source_and_each_question() -> None:
    text = tables(ROWS, {"a": "with", "b": "without"}, {"does it help?": ("a", "b")}, ["rank"])
    assert "Commit: c0ffee" in text and "cpus 2" in text and "n = 2" in text
    assert "| `a` | with | 0.500 ± 0.000 | 0.500 ± 0.000 | 26.00 ± 12.71 |" in text
    assert "| does it help? | `a` | `b` |" in text and "+5.75 ± 15.88" in text
    assert "| training pictures (mean) | 0.500 | 0.600 |" in text
    assert "| `a` | **+0.400 ± 0.000** | -4.00 ± 12.71 | **-0.100 ± 0.000** |" in text
    assert "| degraded | 0.200 | 0.300 | 31.00 | 0.800 |" in text
    assert "| `a` | 0.800 ± 0.000 | **+0.300 ± 0.000** | 0.300 ± 0.000 | **-0.300 ± 0.000** |" in text
    assert "| `b` | 0.550 ± 0.635 | +0.050 ± 0.635 | 0.300 ± 0.000 |" in text, "0.5 and 0.6 above 0.5"


def test_figures_are_svg_and_the_same_each_time() -> None:
    drawn = figures(ROWS, ["a", "b"])
    assert drawn.keys() == {"dial", "frontier"}
    assert all(text.startswith("<svg") for text in drawn.values())
    assert drawn == figures(ROWS, ["a", "b"])


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path))
    assert read_row(folder, "a", 1) is None
    write_row(folder, ROWS[0])
    assert read_row(folder, "a", 1) == ROWS[0]


def test_unknown_variants_and_a_single_seed_are_refused() -> None:
    variants = {"a": Variant(says="")}
    with pytest.raises(UsageError, match="two different"):
        AblationConfig(variants=variants, seeds=[1])
    with pytest.raises(UsageError, match="There is no variant"):
        AblationConfig(variants=variants, comparisons={"?": Comparison(first="a", second="b")})


def test_code_is_told_by_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of both packages, wherever they are: one byte more is another digest, a document is none."""
    assert len(code_digest()) == 8 and code_digest() == code_digest()
    for package in ("iqpir", "pipeline"):
        (tmp_path / package / "inner").mkdir(parents=True)
    monkeypatch.setattr("pipeline.ablation.__file__", str(tmp_path / "pipeline" / "ablation.py"))
    seen = [code_digest()]
    for path in ("iqpir/inner/a.py", "pipeline/a.py", "iqpir/inner/a.safetensors"):
        (tmp_path / path).write_text("1")
        seen.append(code_digest())
    (tmp_path / "iqpir/inner/a.py").write_text("2")
    seen.append(code_digest())
    assert len(set(seen)) == 5
    (tmp_path / "pipeline" / "notes.md").write_text("3")
    assert code_digest() == seen[-1]


def short_recipe(path: Path) -> Path:
    """The recipe of the repository with one metric, few steps and few pictures."""
    recipe = yaml.safe_load((REPOSITORY / "jobs/recipes/ablation_tiny.yaml").read_text())
    recipe["score"]["metrics"] = recipe["label"]["metrics"] = ["rank", "rank_judge"]
    recipe["curate"]["holdout"] = 0.25
    recipe["stage1"] |= SHORT
    recipe["stage1"]["stage"]["warmup_steps"] = 1
    recipe["stage2"] |= SHORT
    recipe["evaluate"] |= {"samples": 4, "dial": [0.05, 0.5, 0.95]}
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow
def test_each_run_is_made_once_and_leaves_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {
        "with": Variant(says="the recipe"),
        "without": Variant(says="no anchor, no codes", stage2={"stage.quality_anchor": 0.0}, evaluate=CONTINUOUS),
    }
    config = AblationConfig(
        variants=variants,
        comparisons={"?": Comparison(first="with", second="without")},
        seeds=[1, 2],
        outside=["rank_judge"],
        input=str(write_pictures(tmp_path / "pictures", 6)),
        folder=str(tmp_path / "ablation"),
        recipe=str(short_recipe(tmp_path / "recipe.yaml")),
    )
    first = ablation(config)
    assert (first.runs, first.skipped) == (4, 0)
    output = Path(first.output)
    assert sorted(path.name for path in output.iterdir()) == [
        *("ablation-dial.svg", "ablation-frontier.svg", "ablation.jsonl", "ablation.md")
    ]
    rows = [json.loads(line) for line in (output / "ablation.jsonl").read_text().splitlines()]
    assert [(found["variant"], found["seed"]) for found in rows] == [
        *(("with", 1), ("without", 1), ("with", 2), ("without", 2))
    ]
    assert len({json.dumps(found["figures"]) for found in rows}) == 4, "seeds and variants differ"
    assert rows[1]["settings"]["stage2"] == {"stage.quality_anchor": 0.0} and rows[1]["commit"]
    stage1 = {path.name for path in (tmp_path / "ablation/runs").iterdir() if path.name.startswith("stage1-")}
    assert len(stage1) == 2, "variants that agree on stage 1 share it"

    text = (output / "ablation.md").read_text()
    again = ablation(config)
    assert (again.runs, again.skipped) == (4, 4)
    assert (output / "ablation.md").read_text() == text

    monkeypatch.setattr("pipeline.ablation.code_digest", lambda: "00000000")
    other = ablation(replace(config, seeds=[1, 2], variants={"with": variants["with"]}, comparisons={}))
    assert (other.runs, other.skipped) == (2, 0), "rows of other code are made again"
    stage1 = {path.name for path in (tmp_path / "ablation/runs").iterdir() if path.name.startswith("stage1-")}
    assert len(stage1) == 4, "and so are their runs"


CONTINUOUS = {"latents": "continuous"}
