"""A step's small arrays on their way to the device, in one transfer that the host never awaits.

On a GPU they go through pinned memory: a ring of buffers, each with the event after which it may be
written again. Nothing is allocated per step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


class Uploader:
    """Moves arrays to one device, on torch's current stream.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def __call__(self, *arrays: Array) -> list[torch.Tensor]:
        """The arrays as tensors of the same dtypes and shapes.

        Args:
            arrays: nobody changes them afterwards: on a CPU the tensors are the arrays.
        """
        if self.device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        return [torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays]
