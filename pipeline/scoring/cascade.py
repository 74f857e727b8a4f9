"""A cascade: cheap metrics decide which samples a dear one sees. A skipped sample has a row that says so."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iqpir.errors import UsageError

SKIPPED = "skipped_cascade"
"""Status of a sample that a cascade kept from a metric."""
UNKNOWN = "no_"
"""Begins the error code of a sample that was skipped because the metric after it has no score of it."""

_TERM = re.compile(r"^([A-Za-z0-9_+.\-]+)\s*(>=|<=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)$")
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


@dataclass(frozen=True)
class Term:
    """One comparison of a raw score, such as ``rank > 0.3``."""

    metric: str
    sign: str
    threshold: float


@dataclass(frozen=True)
class Gate:
    """Comparisons that must all hold for a sample to be scored."""

    terms: tuple[Term, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics whose scores are compared, each once."""
        return tuple(dict.fromkeys(term.metric for term in self.terms))

    def refusal(self, scores: Mapping[str, float | None]) -> str:
        """Why a sample with these raw scores is skipped: an error code; empty if it is scored."""
        for term in self.terms:
            score = scores.get(term.metric)
            if score is None:
                return f"{UNKNOWN}{term.metric}"
            if not _OPERATORS[term.sign](score, term.threshold):
                return f"by_{term.metric}"
        return ""

    def facts(self, fingerprints: Mapping[str, str]) -> list[dict[str, Any]]:
        """JSON values for the fingerprint of the metric behind the gate: other scores before it, other gaps."""
        return [{**vars(term), "fingerprint": fingerprints[term.metric]} for term in self.terms]


def parse_cascade(cascade: Mapping[str, str], metrics: Sequence[str]) -> dict[str, Gate]:
    """Metric -> its gate.

    Args:
        cascade: metric -> condition, such as ``{"musiq": "rank > 0.3 and rank < 0.9"}``.
        metrics: those that are scored; gates and what they compare are among them.

    Raises:
        UsageError: a condition that is none, a metric that is not scored, or a circle.
    """
    gates = {}
    for metric, condition in cascade.items():
        terms = []
        for part in re.split(r"\s+and\s+", condition.strip()):
            match = _TERM.match(part)
            if match is None:
                raise UsageError(
                    f"cascade.{metric} {condition!r} is no condition.",
                    "Compare raw scores with numbers: rank > 0.3, or rank > 0.3 and rank < 0.9.",
                )
            terms.append(Term(match[1], match[2], float(match[3])))
        gates[metric] = Gate(tuple(terms))
    for name in {*gates, *(name for gate in gates.values() for name in gate.metrics)}:
        if name not in metrics:
            raise UsageError(f"The cascade names {name}, which is not among the metrics {', '.join(metrics)}.")
    in_order(metrics, gates)
    return gates


def in_order(metrics: Sequence[str], gates: Mapping[str, Gate]) -> list[str]:
    """``metrics``, each after those that its gate compares; otherwise in their order.

    Raises:
        UsageError: gates wait for each other in a circle.
    """
    ordered: list[str] = []
    while len(ordered) < len(metrics):
        ready = [
            name
            for name in metrics
            if name not in ordered and all(other in ordered or other not in metrics for other in _compared(gates, name))
        ]
        if not ready:
            left = [name for name in metrics if name not in ordered]
            raise UsageError(f"The cascade of {', '.join(left)} is a circle.", "Let one go without a condition.")
        ordered += ready
    return ordered


def _compared(gates: Mapping[str, Gate], name: str) -> tuple[str, ...]:
    return gates[name].metrics if name in gates else ()
