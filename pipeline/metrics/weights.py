"""Where the weights of metrics come from: caches of libraries, filled from a mirror, never from the network.

A mirror is a folder or URL with files and a ``SHA256SUMS`` beside them. A file is copied whole and checked into the
cache where the library looks, so each machine fetches it once. Files of a Hugging Face repository lie in the
mirror under ``<owner>/<repository>/<file>``, all others by their name alone.
"""

import functools
import hashlib
import importlib
import io
import os
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from iqpir.errors import UsageError
from pipeline.storage import Storage

SUMS = "SHA256SUMS"
"""File of a weights mirror: a line ``<sha256>  <file name>`` for each weight file beside it."""

_HUB_USERS = ("timm.models._hub", "transformers.utils.hub", "huggingface_hub")
"""Modules that call their own name ``hf_hub_download``."""


@dataclass
class Weights:
    """Finds the files that one metric asks for while it is built.

    Attributes:
        metric: its name, for messages.
        mirror: where files are copied from; None: caches only.
        missing: files of Hugging Face that were asked for and are nowhere, as ``owner/repository/file``.
    """

    metric: str
    mirror: Storage | None
    missing: list[str] = field(default_factory=list)

    def place(self, name: str, target: Path, url: str) -> None:
        """Put the mirror's file ``name`` at ``target``, whole and checked.

        Raises:
            UsageError: there is no mirror, or it has no such file, no sum of it, or another content.
        """
        if self.mirror is None:
            raise UsageError(
                f"Metric {self.metric!r} needs the weight file {name}; weights are not downloaded while scoring.",
                f"Put it at {target} (from {url}), or in a folder or bucket given as weights_uri.",
            )
        data = self.read(name, url)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data)
        temporary.replace(target)

    def read(self, name: str, url: str) -> bytes:
        """The mirror's file ``name``, checked.

        Raises:
            UsageError: it has no such file, no sum of it, or another content.
        """
        assert self.mirror is not None, "asked only where there is a mirror"
        try:
            sums = self.sums()
            data = self.mirror.read(name)
        except FileNotFoundError as error:
            raise UsageError(
                f"Metric {self.metric!r} needs {self.mirror.uri(name)} and {self.mirror.uri(SUMS)}; one of them is "
                "not there.",
                f"Put {name} (from {url}) there and add the output of sha256sum to {SUMS}.",
            ) from error
        if sums.get(name) != hashlib.sha256(data).hexdigest():
            raise UsageError(f"{self.mirror.uri(name)} is not what {SUMS} says.", "Copy it again, or correct the sum.")
        return data

    def sums(self) -> dict[str, str]:
        """Name -> sha256 of every file that the mirror lists.

        Raises:
            FileNotFoundError: it has no list.
        """
        assert self.mirror is not None, "asked only where there is a mirror"
        pairs = (line.split() for line in self.mirror.read(SUMS).decode().splitlines())
        return {parts[1].lstrip("*").removeprefix("./"): parts[0] for parts in pairs if len(parts) == 2}

    @contextmanager
    def checking(self, caches: Iterable[Path]) -> Iterator[None]:
        """Check what is cached under the names of the mirror before a metric is built of it inside.

        A file of an earlier download, or of another mirror, would else be used as it is.

        Args:
            caches: folders in which libraries look for files by their names alone.

        Raises:
            UsageError: a file is not what the mirror's sum says, or a metric was built and the mirror has no sums.
        """
        if self.mirror is None:
            yield
            return
        try:
            sums = self.sums()
        except FileNotFoundError as error:
            yield
            raise UsageError(
                f"{self.mirror.url} has no {SUMS} to check cached weights of metric {self.metric!r} against.",
                f"Put the output of sha256sum there as {SUMS}, or give no weights_uri.",
            ) from error
        for file in (cache / name for cache in caches for name in sums if "/" not in name):
            if file.is_file():
                self.check(file, sums[file.name])
        yield

    def check(self, file: Path, expected: str) -> None:
        """Raise ``UsageError`` unless a cached file has the sha256 that the mirror gives it."""
        facts = file.stat()
        if _file_digest(file, facts.st_mtime_ns, facts.st_size) != expected:
            raise UsageError(
                f"The cached weight file {file} is not what {SUMS} of weights_uri says.",
                "Remove it: it is then copied from there. Or correct the sum.",
            )

    def open_url(self, request: Any, *_: Any, **__: Any) -> "_Response":
        """What CLIP's loader gets in place of ``urllib.request.urlopen``; it checks and keeps the file itself.

        Raises:
            UsageError: there is no mirror, or it lacks the file.
        """
        url = str(getattr(request, "full_url", request))
        name = url.rsplit("/", 1)[-1]
        if self.mirror is None:
            raise UsageError(
                f"Metric {self.metric!r} needs the weight file {name}; weights are not downloaded while scoring.",
                f"Put it at {Path(torch.hub.get_dir()) / 'clip' / name} (for afine_nr: ~/.cache/clip; from {url}), or "
                "in a folder or bucket given as weights_uri.",
            )
        return _Response(self.read(name, url))

    def hub_download(self, original: Callable[..., str]) -> Callable[..., str]:
        """``hf_hub_download`` that looks into the mirror for what the cache lacks."""

        def download(repo_id: str, filename: str, *arguments: Any, **named: Any) -> str:
            name = f"{repo_id}/{filename}"
            try:
                cached = Path(original(repo_id, filename, *arguments, **named))
            except OSError:
                if self.mirror is None or not self.mirror.exists(name):
                    self.missing.append(name)
                    raise
                cached = Path(torch.hub.get_dir()) / "iqpir-mirror" / name
                if not cached.exists():
                    self.place(name, cached, f"https://huggingface.co/{repo_id}")
            sums = self.sums() if self.mirror is not None and self.mirror.exists(SUMS) else {}
            if name in sums:
                self.check(cached, sums[name])
            return str(cached)

        return download

    def hub_error(self) -> UsageError | None:
        """What to say where files of Hugging Face are missing; None where none is."""
        if not self.missing:
            return None
        repository, _, name = self.missing[0].rpartition("/")
        return UsageError(
            f"Metric {self.metric!r} needs {name} of the Hugging Face repository {repository}; weights are not "
            "downloaded while scoring.",
            f"Fill the cache below HF_HOME (hf download {repository}), or put {self.missing[0]} and its line of "
            f"{SUMS} in a folder or bucket given as weights_uri.",
        )


@functools.lru_cache(maxsize=4096)
def _file_digest(file: Path, changed: int, size: int) -> str:
    """sha256 of a file; taken once a process while its time of change and its size stay."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class _Response(io.BytesIO):
    """Bytes that look like an answer of ``urlopen``."""

    def info(self) -> dict[str, str]:
        """Its headers."""
        return {"Content-Length": str(len(self.getbuffer()))}

    def __enter__(self) -> "_Response":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def without_network(weights: Weights, download_util: Any) -> Iterator[None]:
    """Replace what libraries download with by functions that look into the mirror, or refuse.

    Args:
        weights: of the metric that is built inside.
        download_util: pyiqa's module of that name.
    """

    def fetch(url: str, target: str, *_: Any, **__: Any) -> None:
        weights.place(Path(target).name, Path(target), url)

    places: list[tuple[Any, str, Any]] = [
        (download_util, "download_url_to_file", fetch),
        (torch.hub, "download_url_to_file", fetch),
        (urllib.request, "urlopen", weights.open_url),
    ]
    for name in _HUB_USERS:
        if util.find_spec(name.partition(".")[0]) is not None:
            module = importlib.import_module(name)
            places.append((module, "hf_hub_download", weights.hub_download(module.hf_hub_download)))
    with ExitStack() as stack:
        for module, attribute, replacement in places:
            stack.callback(setattr, module, attribute, getattr(module, attribute))
            setattr(module, attribute, replacement)
        yield
