"""A model is judged by a metric that was not in its loss, or not at all."""

import pytest

from iqpir.errors import UsageError
from pipeline.judging.outside import JUDGE, held_out, outside_figures
from pipeline.scoring.calibration import Calibration, ScoreMap

MAP = ScoreMap(kind="range", direction="higher", knots=(0.0, 10.0), values=(0.0, 1.0))


def calibration(*metrics: str) -> Calibration:
    return Calibration(name="c", metrics=dict.fromkeys(metrics, MAP), fingerprints={}, consensus=None, reference={})


def test_the_measured_metrics_that_the_loss_did_not_have_judge() -> None:
    found = held_out(calibration("rank", "piqe", "niqe"), ["rank", "piqe", "niqe"], ["rank"], [])
    assert found.names == ["piqe", "niqe"] and found.maps == {}


def test_where_the_loss_had_them_all_an_independent_network_judges() -> None:
    found = held_out(calibration("rank"), ["rank"], ["rank"], [])
    assert found.names == [JUDGE]
    assert found.maps[JUDGE]([0.0, 0.25, 0.75]).tolist() == [0.0, 0.25, 0.75]


def test_a_judge_of_the_labels_keeps_their_map() -> None:
    found = held_out(calibration("rank", "piqe"), ["rank"], ["rank"], ["piqe"])
    assert found.names == ["piqe"] and found.maps == {"piqe": MAP}


@pytest.mark.parametrize(
    ("prior", "wanted", "said"),
    [
        (["rank", JUDGE], [], f"{JUDGE} was in the loss"),
        (["rank"], ["rank"], "rank was in the loss.*--outside"),
        (["rank"], ["niqee"], "Unknown metric .niqee."),
    ],
)
def test_what_cannot_judge_is_refused(prior: list[str], wanted: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        held_out(calibration("rank"), ["rank"], prior, wanted)


def test_figures_are_means_over_the_judges_alone() -> None:
    def scores(piqe: float, niqe: float) -> dict[str, float]:
        return {"rank": 0.99, "piqe": piqe, "niqe": niqe}

    sets = {"lq": scores(0.2, 0.4), "hq": scores(0.6, 0.8), "restored": scores(0.1, 0.3)}
    dial = {0.1: scores(0.3, 0.5), 0.5: scores(0.25, 0.35), 0.9: scores(0.1, 0.3)}
    found = outside_figures(["piqe", "niqe"], sets, dial)
    expected = {"lq": 0.3, "hq": 0.7, "restored": 0.2, "dial_spearman": -1.0, "dial_range": -0.2}
    assert found == pytest.approx(expected)
    assert outside_figures(["piqe"], sets, dict.fromkeys((0.1, 0.5, 0.9), scores(0.3, 0.3)))["dial_spearman"] == 0.0
