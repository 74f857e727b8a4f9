"""The degradation of one stored picture: what training feeds on.

The batched implementation, because it gives the pixels of the OpenCV one (up to a level of 255 where rounding
decides) in a fraction of the time, and the same ones for any number of threads.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from iqpir.degradation.batched import degrade_batch
from iqpir.degradation.parameters import DegradationParameters


def degrade(picture: NDArray[np.uint8], parameters: DegradationParameters) -> NDArray[np.uint8]:
    """uint8 RGB [H, W, 3] -> its degraded form, uint8 RGB [H, W, 3]; see ``degrade_batch``.

    The answer lies in memory as [3, H, W], which is what a network takes: turning it costs as much as the JPEG.
    """
    unit = torch.tensor(picture).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    degraded = degrade_batch(unit.div_(255)[None], [parameters])[0]
    levels: NDArray[np.uint8] = degraded.mul_(255).round_().to(torch.uint8).permute(1, 2, 0).numpy()
    return levels
