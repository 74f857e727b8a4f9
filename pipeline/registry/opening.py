"""A restorer from whatever a user calls a model: a version in the registry, a checkpoint, a run."""

from iqpir.restorer import Restorer
from iqpir.training.checkpoint import MANIFEST, load
from pipeline.registry.registered import fetch_registered, resolve
from pipeline.storage import Storage
from pipeline.tracking.runs import reachable, tracking_location, wait_at_most
from pipeline.training.checkpoints import fetch_checkpoint

REGISTERED = "models:/"


def pinned(model: str, tracking_uri: str) -> str:
    """What ``model`` means now: an alias moves, and a run's newest checkpoint gets a successor.

    Args:
        model: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, a checkpoint directory, or a run's folder.
        tracking_uri: registry of ``models:/`` addresses; $MLFLOW_TRACKING_URI or the workspace's if "".

    Returns:
        ``models:/NAME/VERSION``, or the location of one checkpoint, which verifies.

    Raises:
        UsageError: there is no such model, or no registry answers.
        VerificationError: the checkpoint is damaged.
    """
    if not model.startswith(REGISTERED):
        storage, copy = Storage.open(model), fetch_checkpoint(model)
        if storage.local("") is not None:
            return str(copy)
        return storage.url if storage.exists(MANIFEST) else f"{storage.url}/checkpoints/{copy.name}"
    version = resolve(model, _registry(tracking_uri))
    return f"{REGISTERED}{version.name}/{version.version}"


def identity_of(model: str) -> str:
    """What tells two ``pinned`` models apart: the version, or the digest of the weights."""
    return model if model.startswith(REGISTERED) else str(load(fetch_checkpoint(model)).metadata["weights_digest"])


def open_restorer(model: str, tracking_uri: str, device: str, batch_size: int = 4) -> Restorer:
    """The restorer of what a user calls a model, or of what is ``pinned``.

    The weights of a registered model are fetched and proven by its tags; code that lies in the registry is not run.

    Raises:
        UsageError: as for ``pinned``; or jobs/register.py did not make the version.
        VerificationError: a file is not the one that was saved or registered.
    """
    registered = model.startswith(REGISTERED)
    folder = fetch_registered(model, _registry(tracking_uri)) if registered else fetch_checkpoint(model)
    return Restorer.load(folder, device=device, batch_size=batch_size)


def _registry(tracking_uri: str) -> str:
    """Address of the registry, which answers. MLflow's client by itself waits for minutes."""
    uri = tracking_location(tracking_uri)
    wait_at_most(600, 2)
    reachable(uri)
    return uri
