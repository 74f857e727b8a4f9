"""What promotion asks of a model version, and the tags of the registry that hold the answers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iqpir.errors import UsageError, VerificationError
from pipeline.storage import Storage


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Least figures of a champion. How good pictures are is judged by metrics that were not in its loss."""

    min_gain: float = 0.0
    """Restored pictures must exceed the degraded ones by more than this, by the metrics outside the loss."""
    min_dial_spearman: float = 0.9
    """Least rank correlation of requested and measured quality."""
    min_dial_range: float = 0.02
    """Least rise of measured quality from the lowest to the highest request."""
    max_quality_loss: float = 0.0
    """How much lower than the champion's the restored pictures may be, by the metrics outside the loss."""
    max_psnr_loss: float = 1.0
    """How much lower than the champion's the PSNR may be, in dB."""


@dataclass(frozen=True)
class Figures:
    """One evaluation of one version."""

    digest: str
    """Of the evaluation's pictures, protocol and judges: only equal ones are compared."""
    outside_lq: float
    outside_restored: float
    dial_spearman: float
    dial_range: float
    psnr_restored: float

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> "Figures | None":
        """The figures in a version's tags; None if it was registered without an evaluation from outside its loss."""
        if "eval.outside.restored" not in tags:
            return None
        return cls(
            digest=tags["eval.digest"],
            outside_lq=float(tags["eval.outside.lq"]),
            outside_restored=float(tags["eval.outside.restored"]),
            dial_spearman=float(tags["eval.dial_spearman"]),
            dial_range=float(tags["eval.dial_range"]),
            psnr_restored=float(tags["eval.psnr.restored"]),
        )


def refusals(candidate: Figures, champion: Figures | None, config: GateConfig) -> list[str]:
    """Why the candidate must not become champion; empty if it may. NaN never passes."""
    found = []
    gain = candidate.outside_restored - candidate.outside_lq
    if not gain > config.min_gain:
        found.append(
            f"by metrics outside its loss restored quality exceeds that of LQ by {gain:.4f}, "
            f"not by more than {config.min_gain}"
        )
    if not candidate.dial_spearman >= config.min_dial_spearman:
        found.append(
            f"measured quality does not rise with the dial: Spearman {candidate.dial_spearman:.3f}, "
            f"least {config.min_dial_spearman}"
        )
    if not candidate.dial_range >= config.min_dial_range:
        found.append(f"the dial spans {candidate.dial_range:.4f}, least {config.min_dial_range}")
    return found if champion is None else found + _against(candidate, champion, config)


def _against(candidate: Figures, champion: Figures, config: GateConfig) -> list[str]:
    """Reasons that come from the comparison."""
    if candidate.digest != champion.digest:
        return [
            f"it was evaluated on {candidate.digest}, the champion on {champion.digest}: other pictures, another "
            "protocol, or other metrics outside the loss (--outside of jobs/evaluate.py)"
        ]
    found = []
    if not candidate.outside_restored >= champion.outside_restored - config.max_quality_loss:
        found.append(
            f"by metrics outside its loss restored quality {candidate.outside_restored:.4f} is below the champion's "
            f"{champion.outside_restored:.4f}"
        )
    if not candidate.psnr_restored >= champion.psnr_restored - config.max_psnr_loss:
        found.append(f"PSNR {candidate.psnr_restored:.2f} dB is below the champion's {champion.psnr_restored:.2f} dB")
    return found


def evaluation_tags(location: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    """What promotion needs of an evaluation.json, as tags of a version.

    Args:
        location: file or URL.
        metadata: of the checkpoint.

    Raises:
        UsageError: it is absent or not an evaluation.
        VerificationError: it is of other weights.
    """
    parent, _, name = location.rstrip("/").rpartition("/")
    try:
        record = json.loads(Storage.open(parent or ".").read(name))
        tags = {
            "eval.digest": str(record["digest"]),
            "eval.dial_spearman": repr(float(record["dial_spearman"])),
            "eval.dial_range": repr(float(record["dial_range"])),
            **{f"eval.quality.{key}": repr(float(value)) for key, value in record["quality"].items()},
            "eval.outside.metrics": " ".join(record["outside_metrics"]),
            **{f"eval.outside.{key}": repr(float(value)) for key, value in record["outside"].items()},
            **{f"eval.psnr.{key}": repr(float(value)) for key, value in record["psnr"].items()},
        }
    except FileNotFoundError as error:
        raise UsageError(f"There is no evaluation at {location}.", "jobs/evaluate.py writes one.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{location} is no evaluation: {error!r}.", "jobs/evaluate.py writes one.") from error
    weights = record.get("weights_digest") or (record.get("lineage") or {}).get("weights")
    if weights and weights != metadata.get("weights_digest"):
        raise VerificationError(f"{location} is an evaluation of other weights.", "Evaluate this checkpoint.")
    return tags
