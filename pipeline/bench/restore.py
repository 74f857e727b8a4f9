"""Row ``restore``: whole pictures of 512 x 512 through the network, images a second."""

import torch
from torch import Tensor

from iqpir.errors import UsageError
from iqpir.networks.restoration_network import build
from iqpir.restorer import Restorer, save_model
from pipeline.bench.measure import Measured, Options, alternate, require_equal
from pipeline.bench.pictures import picture
from pipeline.torchvision_ops import ensure_torchvision_operators

TOLERANCE = 1e-3
"""Of the largest absolute difference, of pictures in [0, 1], in float32."""


def run(options: Options) -> Measured:
    """The same random weights on both sides; ``count`` pictures, one at a time; fidelity 0.

    Raises:
        UsageError: spandrel or its extra architectures are not installed.
    """
    torch.set_num_threads(options.threads)
    ensure_torchvision_operators()
    try:
        from spandrel_extra_arches.architectures.CodeFormer import CodeFormerArch
    except ImportError as error:
        raise UsageError(f"The peer cannot be imported ({error}).", "pip install 'iqpir[plugin]'.") from error
    torch.manual_seed(0)
    network = build("codeformer512")
    theirs = CodeFormerArch().load(dict(network.state_dict())).model.to(options.device).eval()
    save_model(network, options.folder / "model", {})
    restorer = Restorer.load(options.folder / "model", options.device)
    side = network.config.image_size
    pictures = [
        torch.from_numpy(picture(number, side)).permute(2, 0, 1).float().div(255) for number in range(options.count)
    ]

    def ours() -> list[Tensor]:
        return [restorer.restore(one) for one in pictures]

    @torch.inference_mode()
    def spandrel() -> list[Tensor]:
        made = [theirs(one[None].to(options.device) * 2 - 1, weight=0)[0][0].float().cpu() for one in pictures]
        return [((one + 1) / 2).clamp(0, 1) for one in made]

    checked: dict[str, float] = {}
    largest = max((mine - one).abs().max().item() for mine, one in zip(ours(), spandrel(), strict=True))
    require_equal(checked, "largest difference of a pixel in [0, 1]", largest, TOLERANCE)
    rates = alternate(ours, spandrel, options.count, options.runs)
    return Measured(ours=rates[0], peer=rates[1], unit="images/s", checked=checked)
