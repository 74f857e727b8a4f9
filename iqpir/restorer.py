"""Restore pictures of any size and kind with a saved model.

A model directory holds ``config.json`` (``network``: its configuration; ``metadata``: where it comes from)
and ``model.safetensors``. A training checkpoint is such a directory too. A file is a published checkpoint.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from iqpir.config import NetworkConfig
from iqpir.errors import PermanentError, UsageError, VerificationError
from iqpir.faces import FaceDetector, FacesRestored, restore_faces
from iqpir.networks.restoration_network import RestorationNetwork, build
from iqpir.official_checkpoints import OFFICIAL, official_network
from iqpir.pixels import PixelPolicy, decode, encode_png
from iqpir.tiling import Canvas

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_UNFINISHED = ("stage1", "stage2")
"""Stages after which the fidelity modules are still fresh."""

AnyPicture = bytes | Image.Image | NDArray[np.uint8] | Tensor
PictureT = TypeVar("PictureT", bound=AnyPicture)


def save_model(network: RestorationNetwork, directory: Path | str, metadata: Mapping[str, Any]) -> None:
    """Write a model directory that ``Restorer.load`` reads.

    Args:
        network: its weights are written as they are.
        directory: made if missing; files of a model in it are replaced.
        metadata: JSON values: lineage, digests, versions.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    facts = {"network": network.config.to_dict(), "metadata": dict(metadata)}
    (directory / CONFIG_FILE).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


class Restorer:
    """A restoration network ready for pictures of any size.

    Args:
        network: set to evaluation mode and moved to ``device``; on a CPU its generator's weights are laid
            channels-last.
        device: where the network runs; pictures are kept on the CPU and only tiles travel.
        metadata: what the model directory says about the model.
        policy: how encoded pictures are decoded.
        overlap: pixels that neighbouring tiles share; an eighth of a tile if None.
        batch_size: tiles that go through the network at once.
    """

    def __init__(
        self,
        network: RestorationNetwork,
        device: str | torch.device = "cpu",
        *,
        metadata: Mapping[str, Any] | None = None,
        policy: PixelPolicy | None = None,
        overlap: int | None = None,
        batch_size: int = 4,
    ) -> None:
        self.network = network.to(device).eval()
        self.device = torch.device(device)
        if self.device.type == "cpu":
            # A quarter faster there. Not what comes before the codes: its rounding can choose another code.
            self.network.generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.metadata = dict(metadata or {})
        self.policy = policy or PixelPolicy()
        self.image_size = network.config.image_size
        self.overlap = self.image_size // 8 if overlap is None else overlap
        self.batch_size = batch_size
        if not 0 <= self.overlap < self.image_size:
            raise UsageError(f"overlap {overlap} is outside 0..{self.image_size - 1}.")
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size} is not positive.")

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: str | torch.device = "cpu",
        *,
        policy: PixelPolicy | None = None,
        overlap: int | None = None,
        batch_size: int = 4,
    ) -> "Restorer":
        """Read a model directory, a training checkpoint, or a published checkpoint's file.

        A file (``.pth``, read without running code from it, or ``.safetensors``) does not tell alpha and S_thr: they
        are those that the authors trained with. For others give ``official_network(path, alpha=...)`` to ``Restorer``.

        Raises:
            UsageError: there is no model at ``path``, or a file that is no such checkpoint.
            VerificationError: its files are damaged or do not belong together.
        """
        directory = Path(path)
        if directory.is_file():
            network, metadata = official_network(directory), {"stage": OFFICIAL, "lineage": {OFFICIAL: directory.name}}
            return cls(network, device, metadata=metadata, policy=policy, overlap=overlap, batch_size=batch_size)
        facts = _read_config(directory)
        network = build(NetworkConfig.from_dict(facts["network"]))
        _load_weights(network, directory / WEIGHTS_FILE)
        metadata = facts.get("metadata", {})
        return cls(network, device, metadata=metadata, policy=policy, overlap=overlap, batch_size=batch_size)

    def restore(self, picture: PictureT, quality: float | Sequence[float] = 0.95, fidelity: float = 0.0) -> PictureT:
        """Restore one picture; the answer is of the same kind and size.

        Args:
            picture: encoded bytes (PNG bytes come back), a PIL picture, uint8 [H, W, 3] in RGB, or a float
                tensor [3, H, W] or [B, 3, H, W] in [0, 1].
            quality: wanted quality in [0, 1]; one value for each conditioning score, or one for all.
            fidelity: 0 trusts the learned quality, 1 the input; in [0, 1]. Above 0 it needs ``takes_fidelity``.

        Raises:
            PictureError: the bytes are no picture.
            UsageError: the picture is of another kind, a dial is out of range, or the model has not learnt it.
        """
        return self.restore_batch([picture], quality, fidelity)[0]

    def restore_batch(
        self, pictures: Sequence[PictureT], quality: float | Sequence[float] = 0.95, fidelity: float = 0.0
    ) -> list[PictureT]:
        """Restore several pictures, of any sizes and kinds; their tiles share batches. See ``restore``."""
        wanted = self._wanted(quality)
        self._check_fidelity(fidelity)
        opened = [self._open(picture) for picture in pictures]
        frames = [frame for group in opened for frame in group]
        restored = self._restore_frames(frames, wanted, float(fidelity))
        answers = []
        for picture, group in zip(pictures, opened, strict=True):
            answers.append(_like(picture, [next(restored) for _ in group]))
        return answers

    def restore_faces(
        self,
        picture: bytes | Image.Image | NDArray[np.uint8],
        detector: FaceDetector,
        quality: float | Sequence[float] = 0.95,
        fidelity: float = 0.0,
        *,
        background: Literal["keep", "restore"] = "keep",
        feather: float = 0.1,
        which: Literal["all", "largest"] = "all",
    ) -> FacesRestored:
        """Restore the faces in a whole picture: found, aligned to the network's pose and size, put back softly.

        Args:
            picture: encoded bytes, a PIL picture, or uint8 [H, W, 3] in RGB.
            detector: uint8 RGB [H, W, 3] -> ``iqpir.faces.Face``s with five points each.
            quality: as for ``restore``.
            fidelity: as for ``restore``.
            background: everything but the faces: left as it is, or restored in tiles.
            feather: width of the soft border around a face, as a share of it, above 0 and at most 0.5.
            which: every face, or the largest.

        Returns:
            the picture, uint8 [H, W, 3] in RGB, and how many faces were restored; 0 restored none.

        Raises:
            PictureError: the bytes are no picture.
            UsageError: as for ``restore``, or ``feather`` is out of range.
        """

        def several(faces: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
            return self.restore_batch(faces, quality, fidelity)

        def whole(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return self.restore(array, quality, fidelity)

        return restore_faces(
            self._array(picture),
            detector,
            several,
            self.image_size,
            background=whole if background == "restore" else None,
            feather=feather,
            which=which,
        )

    @property
    def takes_fidelity(self) -> bool:
        """Whether a fidelity above 0 means something: stage 3 has trained the modules that it weighs.

        Weights that do not say their stage (official ones, a network in memory) are taken as trained.
        """
        return bool(self.network.config.connect_sizes) and self.metadata.get("stage") not in _UNFINISHED

    def _check_fidelity(self, fidelity: float) -> None:
        _check_dial("fidelity", fidelity)
        if fidelity > 0 and not self.takes_fidelity:
            raise UsageError(
                f"fidelity {fidelity} needs what stage 3 trains; this model is of {self.metadata.get('stage')}, with "
                f"connect_sizes {list(self.network.config.connect_sizes)}.",
                "Use fidelity 0, or train stage 3 (jobs/stage3.py) and use its checkpoint.",
            )

    def _wanted(self, quality: float | Sequence[float]) -> Tensor:
        """The dial as a row for one sample: [] for one value, [n] for one value per score."""
        several = isinstance(quality, Sequence)
        values = list(cast(Sequence[float], quality)) if several else [cast(float, quality)]
        for value in values:
            _check_dial("quality", value)
        scores = len(self.network.config.quality_bins)
        if several and len(values) != scores:
            named = self.metadata.get("lineage", {}).get("scores", "")
            told = f": of {', '.join(named.split())}" if named else ""
            raise UsageError(f"{len(values)} qualities were given.", f"This model takes one or {scores}{told}.")
        return torch.tensor(values if several else values[0], dtype=torch.float32, device=self.device)

    def _open(self, picture: AnyPicture) -> list[Tensor]:
        """Float frames [3, H, W] in [-1, 1] on the CPU."""
        if isinstance(picture, Tensor):
            return _frames_of_tensor(picture)
        return [torch.from_numpy(self._array(picture)).permute(2, 0, 1).float() / 127.5 - 1]

    def _array(self, picture: bytes | Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pixels, uint8 RGB [H, W, 3]."""
        if isinstance(picture, bytes):
            return decode(picture, self.policy).array
        return self._array_of_pil(picture) if isinstance(picture, Image.Image) else _checked_array(picture)

    def _array_of_pil(self, image: Image.Image) -> NDArray[np.uint8]:
        """Pixels of a PIL picture; what is not plain RGB goes through the same policy as files."""
        if image.mode == "RGB":
            return np.array(image)
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            return np.array(image.convert("RGB"))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=0)
        return decode(buffer.getvalue(), self.policy).array

    def _restore_frames(self, frames: Sequence[Tensor], wanted: Tensor, fidelity: float) -> Iterator[Tensor]:
        """Restored frames [3, H, W] in [-1, 1], in order; a frame is given away as soon as it is complete."""
        waiting: list[Canvas] = []
        batch: list[tuple[Canvas, int]] = []
        for frame in frames:
            canvas = Canvas(frame, self.image_size, self.overlap)
            waiting.append(canvas)
            for number in range(len(canvas.corners)):
                batch.append((canvas, number))
                if len(batch) == self.batch_size:
                    self._run(batch, wanted, fidelity)
                    batch = []
            while waiting and waiting[0].complete:
                yield waiting.pop(0).result()
        if batch:
            self._run(batch, wanted, fidelity)
        for canvas in waiting:
            yield canvas.result()

    def _run(self, batch: Sequence[tuple[Canvas, int]], wanted: Tensor, fidelity: float) -> None:
        tiles = torch.stack([canvas.cut(number) for canvas, number in batch]).to(self.device)
        quality = wanted.expand(len(batch), *wanted.shape)
        with torch.inference_mode():
            restored = self.network(tiles, quality, fidelity).float().cpu()
        if not torch.isfinite(restored).all():
            raise PermanentError(
                "The network gave values that are not finite.",
                "Its weights are damaged or diverged in training.",
            )
        for (canvas, number), tile in zip(batch, restored.clamp(-1, 1), strict=True):
            canvas.paste(number, tile)


def _read_config(directory: Path) -> dict[str, Any]:
    """The parsed ``config.json``, with a ``network`` in it."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / name).is_file()]
    if missing:
        raise UsageError(
            f"{directory} is no model directory: {' and '.join(missing)} missing.",
            "Give a directory written by save_model, or a training checkpoint.",
        )
    try:
        facts = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise VerificationError(f"{directory / CONFIG_FILE} is not JSON ({error}).") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("network"), dict):
        raise VerificationError(f"{directory / CONFIG_FILE} has no 'network'.")
    return facts


def _load_weights(network: RestorationNetwork, file: Path) -> None:
    """Every tensor of ``network`` from ``file``, none missing, none left over."""
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise VerificationError(f"{file} is damaged ({error}).", "Fetch or write it again.") from error
    own = network.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise VerificationError(
            f"{file} is not of the network in {CONFIG_FILE}: {len(wrong)} tensors differ, such as {wrong[0]}."
        )
    network.load_state_dict(state, strict=True)


def _check_dial(name: str, value: object) -> None:
    # Not a number fails the comparison too.
    if not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
        raise UsageError(f"{name} {value!r} is outside [0, 1].")


def _frames_of_tensor(pictures: Tensor) -> list[Tensor]:
    shape = tuple(pictures.shape)
    if len(shape) not in (3, 4) or shape[-3] != 3 or 0 in shape or not pictures.is_floating_point():
        raise UsageError(
            f"A {pictures.dtype} tensor of shape {shape} is no picture.",
            "Give floats in [0, 1] of shape [3, H, W] or [B, 3, H, W].",
        )
    if not bool(((pictures >= 0) & (pictures <= 1)).all()):
        raise UsageError("The tensor has values outside [0, 1].", "Pictures here are in [0, 1], not [-1, 1].")
    frames = pictures.detach().float().cpu() * 2 - 1
    return list(frames) if frames.ndim == 4 else [frames]


def _checked_array(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if not isinstance(array, np.ndarray):
        raise UsageError(f"A {type(array).__name__} is no picture.", "Give bytes, a PIL picture, an array or a tensor.")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise UsageError(f"An array of {array.dtype} {array.shape} is no picture.", "Give uint8 [H, W, 3] in RGB.")
    # A copy: a view may be read-only or have negative strides, which torch refuses.
    return np.array(array, order="C")


def _like(picture: PictureT, frames: Sequence[Tensor]) -> PictureT:
    """Restored frames [3, H, W] in [-1, 1] as the kind of ``picture``."""
    answer: AnyPicture
    if isinstance(picture, Tensor):
        unit = [(frame + 1) / 2 for frame in frames]
        answer = (torch.stack(unit) if picture.ndim == 4 else unit[0]).to(picture)
    else:
        levels = ((frames[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        array = levels.permute(1, 2, 0).contiguous().numpy()
        if isinstance(picture, bytes):
            answer = encode_png(array)
        else:
            answer = Image.fromarray(array) if isinstance(picture, Image.Image) else array
    return cast(PictureT, answer)
