"""Make the candidate of a registered model its champion, if it is not worse on one and the same evaluation.

Two aliases cannot move at once: ``previous`` moves first, so that at any moment the way back is known, and
the same command finishes what a crash interrupted.
"""

import dataclasses
from dataclasses import dataclass
from datetime import UTC, datetime

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from iqpir.errors import UsageError, VerificationError
from pipeline.register import CANDIDATE, SELF_CHECK
from pipeline.registry.gate import Figures, GateConfig, refusals
from pipeline.tracking.runs import reachable, tracking_location

CHAMPION, PREVIOUS = "champion", "previous"
ROLLED_BACK = "rolled_back"
"""Tag of a version that was champion: when it went."""
_LIMITS = tuple(field.name for field in dataclasses.fields(GateConfig))
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True, kw_only=True)
class PromoteConfig(GateConfig):
    """Which model's candidate, and what is asked of it."""

    name: str = "iqpir"
    """Name of the registered model."""
    tracking_uri: str = ""
    """MLflow server or database; $MLFLOW_TRACKING_URI or the workspace's mlflow.db by default."""
    rollback: bool = False
    """Promote nothing: make ``previous`` the champion again. What was champion keeps a tag that says when it went,
    and is not promoted again."""


@dataclass(frozen=True)
class PromoteResult:
    """The champion now, and the one before."""

    name: str
    version: str
    model_uri: str
    previous: str
    promoted: bool
    evaluation: str
    tracking_uri: str
    rolled_back: str = ""
    """Version that was champion until this command."""


def promote(config: PromoteConfig) -> PromoteResult:
    """Move ``champion`` to the candidate if it passes the gate; the outcome becomes tags of the version.

    With ``rollback``, move it back.

    Raises:
        UsageError: there is no candidate, or none to go back to, or no server.
        VerificationError: the gate refuses; every reason is named.
    """
    uri = tracking_location(config.tracking_uri)
    reachable(uri)
    client = MlflowClient(tracking_uri=uri)
    if config.rollback:
        return _rolled_back(client, config, uri)
    candidate = _version(client, config.name, CANDIDATE)
    if candidate is None:
        raise UsageError(f"The model {config.name} has no candidate.", "jobs/register.py makes one.")
    champion = _version(client, config.name, CHAMPION)
    figures = Figures.from_tags(candidate.tags)
    promoted = champion is None or champion.version != candidate.version
    if promoted:
        _pass_gate(client, config, candidate, figures, champion)
        if champion is not None:
            client.set_registered_model_alias(config.name, PREVIOUS, champion.version)
        client.set_registered_model_alias(config.name, CHAMPION, candidate.version)
    previous = _version(client, config.name, PREVIOUS)
    return PromoteResult(
        name=config.name,
        version=str(candidate.version),
        model_uri=f"models:/{config.name}@{CHAMPION}",
        previous="" if previous is None else str(previous.version),
        promoted=promoted,
        evaluation="" if figures is None else figures.digest,
        tracking_uri=uri,
    )


def _rolled_back(client: MlflowClient, config: PromoteConfig, uri: str) -> PromoteResult:
    """``champion`` moves to ``previous``, which then means nothing any more; the same command finishes a crash's rest.

    Raises:
        UsageError: no previous champion is known.
    """
    champion, previous = (_version(client, config.name, alias) for alias in (CHAMPION, PREVIOUS))
    if champion is None or previous is None:
        missing = CHAMPION if champion is None else PREVIOUS
        raise UsageError(
            f"The model {config.name} has no {missing} version: there is no way back.",
            "See its versions in MLflow; jobs/promote.py without --rollback makes a champion.",
        )
    gone = ""
    if champion.version != previous.version:
        gone = str(champion.version)
        client.set_model_version_tag(config.name, gone, ROLLED_BACK, datetime.now(UTC).isoformat(timespec="seconds"))
        client.set_registered_model_alias(config.name, CHAMPION, previous.version)
    client.delete_registered_model_alias(config.name, PREVIOUS)
    figures = Figures.from_tags(previous.tags)
    return PromoteResult(
        name=config.name,
        version=str(previous.version),
        model_uri=f"models:/{config.name}@{CHAMPION}",
        previous="",
        promoted=False,
        evaluation="" if figures is None else figures.digest,
        tracking_uri=uri,
        rolled_back=gone,
    )


def _pass_gate(
    client: MlflowClient,
    config: PromoteConfig,
    candidate: ModelVersion,
    figures: Figures | None,
    champion: ModelVersion | None,
) -> None:
    """Write ``gate.*`` tags, and raise VerificationError with the reasons if there are any."""
    reasons = []
    if not candidate.tags.get(SELF_CHECK, "").startswith("passed"):
        reasons.append("its self-check has not passed")
    if ROLLED_BACK in candidate.tags:
        reasons.append(f"it was champion and was rolled back on {candidate.tags[ROLLED_BACK]}")
    if figures is None:
        reasons.append("it was registered without an evaluation by metrics outside its loss")
    elif champion is None:
        reasons += refusals(figures, None, config)
    else:
        theirs = Figures.from_tags(champion.tags)
        if theirs is None:
            reasons.append(f"the champion, version {champion.version}, has no evaluation to compare with")
        reasons += refusals(figures, theirs, config)
    facts = {
        "gate.result": "refused" if reasons else "passed",
        "gate.against": "none" if champion is None else str(champion.version),
        "gate.reasons": "; ".join(reasons) or "none",
        "gate.limits": ", ".join(f"{key} {getattr(config, key)}" for key in _LIMITS),
    }
    for key, value in facts.items():
        client.set_model_version_tag(config.name, candidate.version, key, value)
    if reasons:
        raise VerificationError(
            f"Version {candidate.version} of {config.name} stays candidate: {'; '.join(reasons)}.",
            "Evaluate both on the same pictures and register them with --evaluation, or train on.",
        )


def _version(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version an alias points to, or None."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in _ABSENT:
            return None
        raise
