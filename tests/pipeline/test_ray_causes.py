"""Why a training on Ray ended: what the user is told, and whether the same command may go on."""

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from iqpir.errors import IqpirError, VerificationError
from pipeline.training.ray_launch import cause_of


def raised(error: BaseException) -> UserExceptionWithTraceback:
    """As a worker hands it on."""
    return UserExceptionWithTraceback(error, f"Traceback\n  line\n{error!r}")


@pytest.mark.parametrize(
    ("failed", "code", "told"),
    [
        (WorkerGroupError("died", {0: ActorDiedError()}), 3, "--workers.max_failures"),
        (WorkerGroupError("died", {0: raised(RuntimeError("connection closed")), 1: ActorDiedError()}), 3, "closed"),
        (WorkerGroupError("full", {0: raised(OSError("full"))}), 3, "full"),
        (ControllerError(RuntimeError("no room")), 3, "no room"),
        (WorkerGroupError("wrong", {0: raised(RuntimeError("closed")), 1: raised(KeyError("x"))}), 5, "mistake"),
        (WorkerGroupError("lie", {0: raised(VerificationError("It lies.", "Prove it."))}), 4, "It lies. Prove it."),
    ],
    ids=["dead", "dead peer", "disk", "controller", "mistake", "for the user"],
)
def test_the_cause_decides_whether_a_training_may_go_on(failed: TrainingFailedError, code: int, told: str) -> None:
    error = cause_of(failed, "run")
    assert isinstance(error, IqpirError)
    assert error.exit_code == code
    assert told in str(error)
    assert code != 3 or "same command goes on from the newest checkpoint" in str(error)
