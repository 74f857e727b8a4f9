"""A champion is never replaced by a worse model, nor by one that was measured otherwise."""

import dataclasses
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from iqpir.errors import UsageError, VerificationError
from pipeline.promote import CHAMPION, PREVIOUS, PromoteConfig, promote
from pipeline.register import CANDIDATE
from pipeline.tracking.runs import tracking_location

GOOD = {
    "self_check": "passed 0",
    "eval.digest": "e1",
    "eval.quality.lq": "0.30",
    "eval.quality.restored": "0.90",
    "eval.outside.lq": "0.30",
    "eval.outside.restored": "0.60",
    "eval.dial_spearman": "0.98",
    "eval.dial_range": "0.2",
    "eval.psnr.restored": "22.0",
}


class Registry:
    """A registered model whose versions have figures but no weights: promotion reads tags, moves aliases."""

    def __init__(self, uri: str, name: str) -> None:
        self.client, self.name = MlflowClient(uri), name
        self.config = PromoteConfig(name=name, tracking_uri=uri)
        self.client.create_registered_model(name)

    def candidate(self, **changes: str) -> str:
        tags = {**GOOD, **{key.replace("__", "."): value for key, value in changes.items()}}
        tags = {key: value for key, value in tags.items() if value}
        made = self.client.create_model_version(self.name, "file:///nowhere", tags=tags)
        self.client.set_registered_model_alias(self.name, CANDIDATE, made.version)
        return str(made.version)

    def alias(self, alias: str) -> str | None:
        try:
            return str(self.client.get_model_version_by_alias(self.name, alias).version)
        except MlflowException:
            return None

    def tags(self, version: str) -> dict[str, str]:
        return dict(self.client.get_model_version(self.name, version).tags)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking_location("", tmp_path_factory.mktemp("promote"))


@pytest.fixture
def registry(uri: str, request: pytest.FixtureRequest) -> Registry:
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return Registry(uri, name)


def test_the_first_champion_passes_the_absolute_gates(registry: Registry) -> None:
    version = registry.candidate()
    result = promote(registry.config)
    assert result.promoted and result.version == version and result.previous == ""
    assert (registry.alias(CHAMPION), registry.alias(PREVIOUS)) == (version, None)
    assert registry.tags(version)["gate.result"] == "passed" and registry.tags(version)["gate.against"] == "none"


def test_a_better_candidate_replaces_the_champion_which_stays_as_previous(registry: Registry) -> None:
    first = registry.candidate()
    promote(registry.config)
    second = registry.candidate(eval__outside__restored="0.65")
    assert promote(registry.config).previous == first
    assert (registry.alias(CHAMPION), registry.alias(PREVIOUS)) == (second, first)
    assert registry.tags(second)["gate.against"] == first


def test_promoting_twice_changes_nothing(registry: Registry) -> None:
    first = registry.candidate()
    promote(registry.config)
    second = registry.candidate()
    promote(registry.config)
    again = promote(registry.config)
    assert not again.promoted and again.version == second
    assert (registry.alias(CHAMPION), registry.alias(PREVIOUS)) == (second, first)


def test_a_move_that_was_cut_off_between_the_aliases_is_finished(registry: Registry) -> None:
    first = registry.candidate()
    promote(registry.config)
    second = registry.candidate()
    registry.client.set_registered_model_alias(registry.name, PREVIOUS, first)
    assert promote(registry.config).promoted
    assert (registry.alias(CHAMPION), registry.alias(PREVIOUS)) == (second, first)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"eval__outside__restored": "0.30"}, "exceeds that of LQ"),
        ({"eval__outside__restored": "nan"}, "exceeds that of LQ"),
        ({"eval__outside__restored": "0.29", "eval__quality__restored": "0.99"}, "outside its loss"),
        ({"eval__outside__restored": ""}, "without an evaluation by metrics outside its loss"),
        ({"eval__dial_spearman": "0.5"}, "does not rise with the dial"),
        ({"eval__dial_spearman": "nan"}, "does not rise with the dial"),
        ({"eval__dial_range": "0.001"}, "the dial spans"),
        ({"eval__digest": "e2"}, "evaluated on e2, the champion on e1"),
        ({"eval__outside__restored": "0.59"}, "below the champion"),
        ({"eval__psnr__restored": "20.5"}, "PSNR 20.50 dB is below"),
        ({"self_check": "failed: reason"}, "self-check has not passed"),
        ({"self_check": ""}, "self-check has not passed"),
    ],
)
def test_a_worse_candidate_is_refused_and_nothing_moves(
    registry: Registry, changes: dict[str, str], reason: str
) -> None:
    champion = registry.candidate()
    promote(registry.config)
    version = registry.candidate(**changes)
    with pytest.raises(VerificationError, match=reason) as caught:
        promote(registry.config)
    assert caught.value.exit_code == 4
    assert (registry.alias(CHAMPION), registry.alias(PREVIOUS)) == (champion, None)
    tags = registry.tags(version)
    assert tags["gate.result"] == "refused" and reason in tags["gate.reasons"]


def test_a_champion_without_figures_cannot_be_compared_with(registry: Registry) -> None:
    old = registry.candidate(eval__outside__restored="")
    registry.client.set_registered_model_alias(registry.name, CHAMPION, old)
    registry.candidate()
    with pytest.raises(VerificationError, match="has no evaluation to compare with"):
        promote(registry.config)


def test_the_limits_are_what_the_configuration_says(registry: Registry) -> None:
    registry.candidate(eval__dial_spearman="0.7")
    config = PromoteConfig(name=registry.name, tracking_uri=registry.config.tracking_uri, min_dial_spearman=0.6)
    assert promote(config).promoted


def test_a_rollback_moves_back_is_recorded_and_is_not_undone_by_the_next_promotion(registry: Registry) -> None:
    first = registry.candidate()
    promote(registry.config)
    second = registry.candidate(eval__outside__restored="0.65")
    promote(registry.config)
    back = dataclasses.replace(registry.config, rollback=True)
    result = promote(back)
    assert (result.version, result.rolled_back, result.previous, result.promoted) == (first, second, "", False)
    assert (registry.alias(CHAMPION), registry.alias(PREVIOUS)) == (first, None)
    when = datetime.fromisoformat(registry.tags(second)["rolled_back"])
    assert abs((datetime.now(UTC) - when).total_seconds()) < 600
    with pytest.raises(VerificationError, match="was champion and was rolled back on"):
        promote(registry.config)
    assert registry.alias(CHAMPION) == first
    third = registry.candidate(eval__outside__restored="0.65")
    assert promote(registry.config).version == third and registry.alias(PREVIOUS) == first


def test_a_rollback_that_was_cut_off_is_finished_and_needs_something_to_go_back_to(registry: Registry) -> None:
    back = dataclasses.replace(registry.config, rollback=True)
    with pytest.raises(UsageError, match="no champion version"):
        promote(back)
    first = registry.candidate()
    promote(registry.config)
    with pytest.raises(UsageError, match="no previous version"):
        promote(back)
    registry.client.set_registered_model_alias(registry.name, PREVIOUS, first)  # as left between the two moves
    assert promote(back).rolled_back == ""
    assert (registry.alias(CHAMPION), registry.alias(PREVIOUS)) == (first, None)


def test_without_a_candidate_it_is_a_usage_error(registry: Registry, uri: str) -> None:
    for name in (registry.name, "never-registered"):
        with pytest.raises(UsageError, match="has no candidate"):
            promote(PromoteConfig(name=name, tracking_uri=uri))


@pytest.mark.slow
def test_the_job_ends_with_code_4_and_names_the_reason(registry: Registry, uri: str) -> None:
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        str(root / "jobs" / "promote.py"),
        "--name",
        registry.name,
        "--tracking_uri",
        uri,
    ]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    registry.candidate(eval__dial_spearman="0.1")
    refused = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert refused.returncode == 4 and "does not rise with the dial" in refused.stderr
    version = registry.candidate()
    passed = subprocess.run(
        [*command, "--min_dial_range", "0.1"], capture_output=True, text=True, env=environment, check=False
    )
    assert passed.returncode == 0, passed.stderr
    assert json.loads(passed.stdout.splitlines()[-1])["version"] == version
