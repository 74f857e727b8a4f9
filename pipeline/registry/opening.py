"""A restorer from whatever a user calls a model: a version in the registry, a checkpoint, a run."""

from iqpir.errors import UsageError
from iqpir.restorer import Restorer
from pipeline.registry.registered import fetch_registered, resolve
from pipeline.tracking.runs import reachable, tracking_location, wait_at_most
from pipeline.training.checkpoints import fetch_checkpoint

REGISTERED = "models:/"


def pinned(model: str, tracking_uri: str) -> str:
    """What ``model`` means now: an alias moves, and a run's newest checkpoint gets a successor.

    Args:
        model: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, a checkpoint directory, or a run's folder.
        tracking_uri: registry of ``models:/`` addresses; $MLFLOW_TRACKING_URI or the workspace's if "".

    Returns:
        ``models:/NAME/VERSION``, or the folder of a local copy that verifies.

    Raises:
        UsageError: there is no such model, or no registry answers.
        VerificationError: the checkpoint is damaged.
    """
    if model.startswith("runs:/"):
        raise UsageError(f"{model} is no registered model.", "Register it (jobs/register.py) and name models:/...")
    if not model.startswith(REGISTERED):
        return str(fetch_checkpoint(model))
    version = resolve(model, _registry(tracking_uri))
    return f"{REGISTERED}{version.name}/{version.version}"


def open_restorer(model: str, tracking_uri: str, device: str) -> Restorer:
    """The restorer of a ``pinned`` model, or of one that will be.

    The weights of a registered model are fetched and proven by its tags; code that lies in the registry is not run.

    Raises:
        UsageError: as for ``pinned``; or jobs/register.py did not make the version.
        VerificationError: a file is not the one that was saved or registered.
    """
    name = pinned(model, tracking_uri)
    folder = fetch_registered(name, _registry(tracking_uri)) if name.startswith(REGISTERED) else name
    return Restorer.load(folder, device=device)


def _registry(tracking_uri: str) -> str:
    """Address of the registry, which answers. MLflow's client by itself waits for minutes."""
    uri = tracking_location(tracking_uri)
    wait_at_most(600, 2)
    reachable(uri)
    return uri
