"""Condition any host network on a wanted quality, by forward hooks alone.

At each place a table holds one vector per knot of quality; the vector of the asked quality, interpolated, is
added to the features (``add``, the way of the paper's score embedding) or scales and shifts them
(``modulate``). The tables start at negative zero, the one number that changes no float when it is added:
before training every bit of the output is the host's own.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from iqpir.errors import UsageError, VerificationError
from iqpir.plug_in.place import READ, Layout, Place, Run, find_places, module_at, place_from, tensor_of
from iqpir.training.checkpoint import weights_digest

if TYPE_CHECKING:
    from iqpir.plug_in.fine_tuning import FineTuneConfig, FineTuneReport, Pairs

Mode = Literal["add", "modulate"]
_FACTS = "quality_prior"

# What is asked is known per prior and per thread or task: nothing leaks from one caller to another.
_ASKED: ContextVar[Mapping[int, Tensor]] = ContextVar("iqpir_asked_quality", default=MappingProxyType({}))


def _apply(host: nn.Module, pictures: Tensor) -> Tensor:
    output: Tensor = host(pictures)
    return output


class AttachedPrior(nn.Module):
    """The quality that a host network is asked for; its parameters are its own, never the host's.

    Made by ``attach_quality_prior``. Without ``asking`` the host computes what it computed before. The host's
    ``state_dict`` has no key of it. ``.to(device)`` moves the tables only; move the host as well.

    Activation checkpointing around an attached module is not supported on a GPU: the recomputation runs in
    another thread, where nothing is asked.
    """

    def __init__(self, host: nn.Module, places: Sequence[Place], mode: Mode, knots: int, run: Run = _apply) -> None:
        super().__init__()
        if knots < 2:
            raise UsageError(f"knots {knots} is below 2.", "The paper's ten bins are 11 knots.", READ)
        # In a tuple, so that the host is no submodule: its weights are not part of this state dict.
        self._host = (host,)
        self.places, self.mode, self.knots, self.run = tuple(places), mode, knots, run
        width = 1 if mode == "add" else 2
        parameter = next(host.parameters(), None)
        device = None if parameter is None else parameter.device
        self.tables = nn.ParameterList(
            torch.full((knots, width * place.channels), -0.0, device=device) for place in places
        )
        self._handles: list[RemovableHandle] = []
        for number, place in enumerate(self.places):
            module = module_at(host, place.path)
            self._handles.append(module.register_forward_hook(_Hook(self, number)))

    @property
    def host(self) -> nn.Module:
        """The network that this prior is attached to."""
        return self._host[0]

    @property
    def paths(self) -> tuple[str, ...]:
        """Where in the host the quality enters."""
        return tuple(place.path for place in self.places)

    @contextmanager
    def asking(self, quality: float | Sequence[float] | Tensor) -> Iterator[None]:
        """Within the block, in this thread, the host is asked for ``quality``.

        Args:
            quality: in [0,1]: one for all samples, or one for each ([B]).

        Raises:
            UsageError: it is out of range or of another shape.
        """
        wanted = torch.as_tensor(quality, dtype=torch.float32).detach()
        if wanted.ndim > 1 or wanted.numel() == 0 or not bool(((wanted >= 0) & (wanted <= 1)).all()):
            raise UsageError(
                f"quality {quality!r} is not in [0, 1].", "Give one number, or one for each picture.", READ
            )
        token = _ASKED.set({**_ASKED.get(), id(self): wanted})
        try:
            yield
        finally:
            _ASKED.reset(token)

    def forward(self, pictures: Tensor, quality: float | Sequence[float] | Tensor) -> Tensor:
        """Pictures [B,3,H,W] in [0,1] -> restored ones, of the asked ``quality`` ([] or [B], in [0,1])."""
        with self.asking(quality):
            return self.run(self.host, pictures)

    def detach(self) -> None:
        """Take the hooks off: the host is what it was. The tables stay, and can be saved."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def fine_tune(
        self,
        batches: "Iterable[Pairs]",
        config: "FineTuneConfig | None" = None,
        *,
        quality: Callable[[Tensor], Tensor] | None = None,
        judge: Callable[[Tensor], Tensor] | None = None,
    ) -> "FineTuneReport":
        """Teach the dial; see ``iqpir.plug_in.fine_tuning.fine_tune``."""
        from iqpir.plug_in.fine_tuning import FineTuneConfig, fine_tune

        return fine_tune(self, batches, config or FineTuneConfig(), quality=quality, judge=judge)

    def save(self, file: Path | str) -> None:
        """Write the tables and what they are attached to as one safetensors file; the host is not in it."""
        facts = {
            "places": [dataclasses.asdict(place) for place in self.places],
            "mode": self.mode,
            "knots": self.knots,
            "host": weights_digest(self.host.state_dict()),
        }
        tensors = {path: table.detach().cpu() for path, table in zip(self.paths, self.tables, strict=True)}
        save_file(tensors, file, metadata={_FACTS: json.dumps(facts, sort_keys=True)})

    def condition(self, number: int, output: object) -> object:
        """What the hook of place ``number`` makes of a module's output; None leaves it as it is."""
        wanted = _ASKED.get().get(id(self))
        if wanted is None:
            return None
        features, place = tensor_of(output), self.places[number]
        if features is None:
            raise UsageError(f"The module {place.path!r} puts out no features any more.", "Attach anew.", READ)
        wanted = wanted.reshape(-1)
        place.check(features, len(wanted))
        table = self.tables[number]
        if table.device != features.device:
            raise UsageError(
                f"The host runs on {features.device}, its quality prior is on {table.device}.",
                f"Move it: prior.to('{features.device}').",
                READ,
            )
        values = _interpolated(table, wanted.to(table.device)).to(features.dtype)
        parts = [place.spread(part) for part in values.split(place.channels, dim=1)]
        changed = features + parts[0] if len(parts) == 1 else features * (1 + parts[0]) + parts[1]
        if isinstance(output, tuple):
            return (changed, *output[1:])
        return [changed, *output[1:]] if isinstance(output, list) else changed


class _Hook:
    """A forward hook that a deep copy of the host takes along, with the prior that it belongs to."""

    def __init__(self, prior: AttachedPrior, number: int) -> None:
        self.prior, self.number = prior, number

    def __call__(self, module: nn.Module, inputs: object, output: object) -> object:
        return self.prior.condition(self.number, output)


def _interpolated(table: Tensor, quality: Tensor) -> Tensor:
    """Rows of ``table`` [knots, C] at ``quality`` [B] in [0,1], linear between knots: [B, C]."""
    position = quality * (len(table) - 1)
    left = position.long().clamp(max=len(table) - 2)
    part = (position - left)[:, None].to(table.dtype)
    return table[left] * (1 - part) + table[left + 1] * part


def attach_quality_prior(
    model: nn.Module,
    at: str | Sequence[str],
    *,
    mode: Mode = "add",
    knots: int = 11,
    run: Run | None = None,
    example: Tensor | None = None,
    layout: Layout = "auto",
) -> AttachedPrior:
    """Condition ``model`` on a wanted quality without editing it. Its output stays the same, bit for bit.

    Args:
        model: any network from pictures to pictures.
        at: dotted path or paths of modules whose output the quality enters: feature maps [B,C,H,W] or
            [B,H,W,C], or tokens [B,N,C] or [N,B,C].
        mode: ``add`` a vector to the channels, or ``modulate`` them (scale and shift).
        knots: qualities with a vector of their own, evenly from 0 to 1; between them it is interpolated.
        run: (model, pictures) -> restored, both [B,3,H,W] in [0,1]; ``model(pictures)`` if None. The ``call_fn``
            of a spandrel architecture is one.
        example: pictures that the model takes, for one forward pass now; a square of 64 pixels if None.
        layout: of 4-axis features; ``auto`` finds it from a square example.

    Raises:
        UsageError: no such module, or one whose output a quality cannot enter.
    """
    paths = [at] if isinstance(at, str) else list(at)
    if not paths:
        raise UsageError("No module is named.", "Give the path of one as `at`.", READ)
    applied = run or _apply
    places = find_places(model, paths, run=applied, example=example, layout=layout)
    return AttachedPrior(model, places, mode, knots, applied)


def load_quality_prior(
    model: nn.Module, file: Path | str, *, run: Run | None = None, any_host: bool = False
) -> AttachedPrior:
    """Attach what ``AttachedPrior.save`` wrote.

    Args:
        model: the host; of the weights that the prior was saved beside, unless ``any_host``.
        file: the safetensors file.
        run: as for ``attach_quality_prior``.
        any_host: attach to other weights of the same architecture as well.

    Raises:
        UsageError: no such file, or a host without the modules.
        VerificationError: the file is damaged, or the host has other weights.
    """
    if not Path(file).is_file():
        raise UsageError(f"{file} does not exist.", "AttachedPrior.save writes such a file.", READ)
    try:
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            facts: dict[str, Any] = json.loads((opened.metadata() or {}).get(_FACTS, "{}"))
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError) as error:
        raise VerificationError(f"{file} is damaged ({error}).", "Save the prior anew.", READ) from error
    if facts.keys() != {"places", "mode", "knots", "host"}:
        raise VerificationError(f"{file} is no saved quality prior.", "AttachedPrior.save writes one.", READ)
    found = weights_digest(model.state_dict())
    if found != facts["host"] and not any_host:
        raise VerificationError(
            f"The prior in {file} belongs to weights {facts['host'][:12]}; this host has {found[:12]}.",
            "Load those weights, or set any_host where the difference is meant.",
            READ,
        )
    prior = AttachedPrior(
        model, [place_from(each) for each in facts["places"]], facts["mode"], facts["knots"], run or _apply
    )
    with torch.no_grad():
        for path, table in zip(prior.paths, prior.tables, strict=True):
            table.copy_(tensors[path])
    return prior


def attached_priors(model: nn.Module) -> list[AttachedPrior]:
    """The priors whose hooks sit on ``model``, such as those that a deep copy took along."""
    found: dict[int, AttachedPrior] = {}
    for module in model.modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, _Hook):
                found[id(hook.prior)] = hook.prior
    return list(found.values())
