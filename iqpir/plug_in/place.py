"""Where in a host network a quality can enter: a module by its path, and the axes of what it puts out."""

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from iqpir.errors import UsageError

READ = "docs/method.md"
Run = Callable[[Any, Tensor], Tensor]
"""(host, pictures) -> restored pictures, both [B,3,H,W] in [0,1]."""
Layout = Literal["auto", "channels_first", "channels_last"]
_HOST_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AssertionError)


@dataclass(frozen=True, kw_only=True)
class Place:
    """One module of a host, and how its output is laid out."""

    path: str
    """Dotted path of the module in the host, as ``named_modules`` has it."""
    channels: int
    """Size of the channel axis."""
    dimensions: int
    """Number of axes of the output."""
    batch_axis: int
    """0, or 1 for sequence-first tokens [N, B, C]."""
    channel_axis: int
    """1 for [B, C, H, W], the last one for tokens."""

    def spread(self, values: Tensor) -> Tensor:
        """[B, C] or [1, C] with axes of size 1 put in, so that it broadcasts over the output."""
        shape = [1] * self.dimensions
        shape[self.batch_axis], shape[self.channel_axis] = values.shape
        return values.reshape(shape)

    def check(self, output: Tensor, samples: int) -> None:
        """Raise UsageError where ``output`` is not what the place was made for."""
        fits = output.ndim == self.dimensions and output.shape[self.channel_axis] == self.channels
        if not fits or samples not in (1, output.shape[self.batch_axis]):
            raise UsageError(
                f"The module {self.path!r} gave {tuple(output.shape)} for {samples} qualities; the quality prior "
                f"expects {self.channels} channels on axis {self.channel_axis} and samples on axis {self.batch_axis}.",
                "Ask one quality, or one for each picture; attach anew if the host has changed.",
                READ,
            )


def tensor_of(output: object) -> Tensor | None:
    """The features in a module's output: itself, or the first of a tuple or list; None where there are none."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


def module_at(host: nn.Module, path: str) -> nn.Module:
    """The module of ``host`` called ``path``.

    Raises:
        UsageError: there is none; the message names those with the nearest paths.
    """
    modules: dict[str, nn.Module] = dict(host.named_modules())
    if path in modules and path:
        return modules[path]
    names = [name for name in modules if name]
    # A path often goes wrong in its middle: what shares its end is near too.
    near = difflib.get_close_matches(path, names, n=5, cutoff=0.5) or names[:5]
    raise UsageError(
        f"{type(host).__name__} has no module {path!r}.",
        f"Near are {', '.join(near)}; `[name for name, _ in model.named_modules()]` lists all.",
        READ,
    )


def find_places(
    host: nn.Module, paths: Sequence[str], *, run: Run, example: Tensor | None, layout: Layout
) -> list[Place]:
    """Run the host once and see what the modules at ``paths`` put out.

    Args:
        host: evaluated without gradients; its modes, statistics and random state stay as they are.
        paths: of the modules.
        run: how the host is applied to pictures.
        example: pictures [B,3,H,W] in [0,1] that the host takes; one drawn square of 64 pixels if None.
        layout: of 4-axis outputs; ``auto`` finds it from a square example.

    Raises:
        UsageError: an unknown path, a host that does not take the example, an output that is no feature map.
    """
    modules = {path: module_at(host, path) for path in paths}
    if len(modules) != len(paths):
        raise UsageError(f"A path is given twice: {', '.join(paths)}.", "A place takes one quality.")
    pictures = _example_for(host) if example is None else example
    outputs = _outputs(host, modules, run, pictures)
    return [_place(path, modules[path], outputs[path], len(pictures), layout) for path in paths]


def _example_for(host: nn.Module) -> Tensor:
    parameter = next(host.parameters(), torch.zeros(()))
    ramp = torch.linspace(0, 1, 64)
    picture = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.flip(0).expand(64, 64)])
    return picture[None].to(parameter.device, parameter.dtype)


def _outputs(host: nn.Module, modules: dict[str, nn.Module], run: Run, pictures: Tensor) -> dict[str, object]:
    found: dict[str, object] = {}

    def recorder(path: str) -> Callable[[nn.Module, object, object], None]:
        def record(module: nn.Module, inputs: object, output: object) -> None:
            found[path] = output

        return record

    handles = [module.register_forward_hook(recorder(path)) for path, module in modules.items()]
    try:
        with torch.no_grad(), evaluating(host):
            run(host, pictures)
    except _HOST_FAILURES as error:
        raise UsageError(
            f"{type(host).__name__} does not take an example of shape {tuple(pictures.shape)}: {error}",
            "Give pictures that it takes as `example`, and how it is applied to them as `run`.",
            READ,
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for path in sorted(modules.keys() - found.keys()):
        raise UsageError(
            f"{type(host).__name__} does not call its module {path!r}.", _inside(path, modules[path]), READ
        )
    return found


def _place(path: str, module: nn.Module, output: object, samples: int, layout: Layout) -> Place:
    features = tensor_of(output)
    if features is None or features.ndim not in (2, 3, 4):
        raise UsageError(
            f"The module {path!r} puts out {_described(output)}: no feature map [B,C,H,W], [B,H,W,C] or [B,N,C].",
            _inside(path, module),
            READ,
        )
    shape = tuple(features.shape)
    channel_axis = _channel_axis(path, shape, layout)
    batch_axis = next((axis for axis in (0, 1) if shape[axis] == samples and axis != channel_axis), None)
    if batch_axis is None or (batch_axis == 1 and features.ndim != 3):
        raise UsageError(
            f"The module {path!r} gives {shape} for {samples} pictures: no axis is that of the pictures.",
            "It may work on windows or patches; attach to a module around it.",
            READ,
        )
    return Place(
        path=path,
        channels=shape[channel_axis],
        dimensions=features.ndim,
        batch_axis=batch_axis,
        channel_axis=channel_axis,
    )


def _channel_axis(path: str, shape: tuple[int, ...], layout: Layout) -> int:
    if len(shape) < 4:
        return len(shape) - 1
    if layout != "auto":
        return 1 if layout == "channels_first" else 3
    # A square picture has square features: the axis that is not one of two equal neighbours is the channels'.
    first, last = shape[2] == shape[3], shape[1] == shape[2]
    if first == last:
        raise UsageError(
            f"The module {path!r} puts out {shape}: which axis holds the channels cannot be seen.",
            "Set layout to channels_first or channels_last, or give a square example of another size.",
            READ,
        )
    return 1 if first else 3


def _inside(path: str, module: nn.Module) -> str:
    """A remedy: the first modules that ``module`` consists of, deep enough to be called."""
    inner = [f"{path}.{name}" for name, part in module.named_modules() if name and not isinstance(part, nn.ModuleList)]
    return f"Attach inside it: {', '.join(inner[:5])}." if inner else "Attach to another module."


def _described(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor {tuple(output.shape)}"
    return f"a {type(output).__name__}"


@contextmanager
def evaluating(host: nn.Module) -> Iterator[None]:
    """``host`` in evaluation mode; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in host.modules()]
    host.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def place_from(values: dict[str, Any]) -> Place:
    """Inverse of ``dataclasses.asdict``.

    Raises:
        UsageError: keys of another version.
    """
    names = {field.name for field in dataclasses.fields(Place)}
    if values.keys() != names:
        raise UsageError(f"A place has the keys {sorted(values)}, not {sorted(names)}.", "Save the prior anew.", READ)
    return Place(**values)
