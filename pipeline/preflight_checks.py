"""What ``pipeline.preflight`` checks: each function returns its finding, or raises what a run would meet."""

import importlib
import importlib.util
import re
import secrets
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from torch.utils.flop_counter import FlopCounterMode

from iqpir.config import NetworkConfig, preset
from iqpir.errors import UsageError
from iqpir.networks.restoration_network import build
from iqpir.pixels import PictureError, decode
from pipeline.cluster import ensure_ray
from pipeline.corpus import Corpus
from pipeline.scoring.score_unit import prove_metrics
from pipeline.storage import Storage
from pipeline.tracking.runs import reachable, tracking_location
from pipeline.training.feed import FeedConfig, fit_picture
from pipeline.training.launch import Workers
from pipeline.view import read_view

FLOORS = {
    "torch": "2.10",
    "ray": "2.56",
    "mlflow": "3.17.2",
    "pyarrow": "14.0.1",
    "fsspec": "2026.6.0",
    "pillow": "12.3.0",
}
"""Oldest versions without a hole that this project's use would open (remote code, path escape)."""
REQUIRED = (
    "cv2",
    "duckdb",
    "fsspec",
    "jsonargparse",
    "mlflow",
    "pyarrow.parquet",
    "ray.train.torch",
    "s3fs",
    "safetensors.torch",
    "webdataset",
)
OPTIONAL = {"ffcv": "export", "pyiqa": "iqa", "spandrel": "plugin", "gradio": "app"}
"""Module and the extra that brings it."""
_SAMPLED = 4
_ADAM_BYTES = 16
"""Bytes of one trained parameter in fp32: weight, gradient and the two moments of Adam."""


def check_versions(floors: dict[str, str] | None = None) -> str:
    """Every package that is installed is at least as new as ``floors``.

    Raises:
        UsageError: one is older, or absent.
    """
    found, wrong = [], []
    for package, floor in (FLOORS if floors is None else floors).items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            wrong.append(f"{package} is not installed")
            continue
        found.append(f"{package} {installed}")
        if _numbers(installed) < _numbers(floor):
            wrong.append(f"{package} {installed} is older than {floor}")
    if wrong:
        raise UsageError(f"{'; '.join(wrong)}.", "Install under constraints.txt.")
    return ", ".join(found)


def _numbers(text: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` as (2, 13, 0), so that versions compare."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def check_imports() -> str:
    """The modules of a run import; Arrow has S3; what is optional and absent is named.

    Raises:
        UsageError: a required module does not import.
    """
    failed = []
    for name in REQUIRED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            failed.append(f"{name} ({error})")
    if failed:
        raise UsageError(f"Cannot import {', '.join(failed)}.", "Install iqpir[pipeline] under constraints.txt.")
    absent = [f"{name} (extra {extra})" for name, extra in OPTIONAL.items() if not _installed(name)]
    arrow = importlib.import_module("pyarrow.fs")
    if not hasattr(arrow, "S3FileSystem"):
        absent.append("S3 in pyarrow (Ray's own storage on s3://)")
    return f"{len(REQUIRED)} required" + (f"; without {', '.join(absent)}" if absent else "")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def check_network(network_preset: str, changed: Mapping[str, Any]) -> str:
    """Shapes, parameters and FLOPs of the network, on the meta device: nothing is allocated.

    Raises:
        UsageError: unknown preset or field.
    """
    values = {**preset(network_preset).to_dict(), **changed}
    wanted = NetworkConfig.from_dict(values)
    network = build(wanted, device="meta")
    picture = torch.empty(1, 3, wanted.image_size, wanted.image_size, device="meta")
    quality = torch.empty(1, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        restored = network(picture, quality)
    if restored.shape != picture.shape:
        raise UsageError(f"The network turns {tuple(picture.shape)} into {tuple(restored.shape)}.")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    gib = parameters * _ADAM_BYTES / 2**30
    return (
        f"{network_preset}: {wanted.image_size} px, {parameters / 1e6:.1f} M parameters, "
        f"{counter.get_total_flops() / 1e9:.2f} GFLOP a picture forward, "
        f"{gib:.2f} GiB to train without activations"
    )


def check_storage(url: str) -> str:
    """Write, read, compare and delete a small object; whether creation is exclusive.

    Raises:
        UsageError: the store cannot be reached or written.
        OSError: it fails in between.
    """
    storage = Storage.open(url)
    name, data = f"_probe/preflight-{secrets.token_hex(8)}", secrets.token_bytes(4096)
    storage.publish(name, data)
    try:
        if storage.read(name) != data or storage.read_range(name, 1000, 24) != data[1000:1024]:
            raise UsageError(f"{storage.uri(name)} reads back with other bytes.", "Is there a cache in between?")
    finally:
        storage.remove(name)
    if storage.exists(name):
        raise UsageError(f"{storage.uri(name)} cannot be deleted.", "Grant deletion, or checkpoints pile up.")
    kind = "exclusive" if storage.conditional else "not exclusive: records carry digests instead"
    return f"{storage.url}: write, read, delete; creation {kind}"


def check_corpus(url: str) -> str:
    """The corpus is sealed.

    Raises:
        UsageError: it is not.
        VerificationError: its manifest contradicts itself.
    """
    manifest = Corpus(url).manifest()
    return f"manifest v{manifest.version:06d}, {manifest.samples} samples"


def check_samples(url: str, reference: str, size: int, feed: FeedConfig) -> str:
    """Some samples of the view's train split read, decode and fit the network.

    Raises:
        UsageError: no such view, or a sample does not fit.
        VerificationError: bytes are not those that were committed.
    """
    corpus = Corpus(url)
    view = read_view(corpus, reference)
    rows = view.split("train")
    step = max(1, rows.num_rows // _SAMPLED)
    chosen = list(range(0, rows.num_rows, step))[:_SAMPLED]
    for row in rows.take(chosen).to_pylist():
        try:
            picture = decode(corpus.read_sample(row), feed.pixels).array
        except PictureError as error:
            raise UsageError(f"Sample {row['key']} does not decode ({error}).") from error
        fit_picture(picture, size, feed.fit)
    return f"{view.reference} ({view.digest}): {len(chosen)} of {rows.num_rows} samples read, decoded, fitted"


def check_metrics(names: Sequence[str], weights_uri: str) -> str:
    """Every metric can be built from the weights that are here or in the mirror.

    Raises:
        UsageError: an unknown metric, or a weight file that is nowhere.
    """
    found = prove_metrics(names, weights_uri)
    return ", ".join(f"{name} ({facts['weights_sha256'][:12] or 'no weights'})" for name, facts in found.items())


def check_tracking(tracking_uri: str) -> str:
    """The tracking server answers.

    Raises:
        UsageError: it does not.
    """
    uri = tracking_location(tracking_uri)
    reachable(uri)
    return f"{_without_password(uri)} answers"


def check_registry(tracking_uri: str) -> str:
    """Models may be registered and deleted.

    Raises:
        UsageError: the registry refuses.
    """
    uri = tracking_location(tracking_uri)
    reachable(uri)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    name = f"iqpir-preflight-{secrets.token_hex(6)}"
    try:
        client.create_registered_model(name, description="Probe of jobs/preflight.py; may be deleted.")
        client.delete_registered_model(name)
    except MlflowException as error:
        raise UsageError(
            f"The registry at {_without_password(uri)} refuses: {' '.join(str(error).split())[:300]}",
            "Ask for the permission to create models, or give --registry false.",
        ) from error
    return f"{_without_password(uri)} lets us register"


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", uri)


def check_cluster(workers: Workers) -> str:
    """The nodes that are alive have room for the workers, each whole on one node.

    Raises:
        UsageError: they have not, or there is no cluster.
    """
    ensure_ray()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    gpu_each = 1.0 if workers.gpus == "yes" or (workers.gpus == "auto" and gpus > 0) else 0.0
    room = sum(_room(node, workers.cpus, gpu_each) for node in nodes)
    seen = f"{len(nodes)} nodes, {sum(node.get('CPU', 0.0) for node in nodes):g} CPUs, {gpus:g} GPUs"
    wanted = workers.min_count or workers.count
    if room < wanted:
        raise UsageError(
            f"{seen}: room for {room} of {wanted} workers of {workers.cpus:g} CPUs, {gpu_each:g} GPUs.",
            "Add nodes (an autoscaler may still do so), or lower workers.count or workers.cpus.",
        )
    return f"{seen}: room for {room} workers, {workers.count} wanted"


def _room(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Workers that one node holds."""
    slots = [node.get("CPU", 0.0) / cpus] if cpus else []
    slots += [node.get("GPU", 0.0) / gpus] if gpus else []
    return int(min(slots, default=0.0))
