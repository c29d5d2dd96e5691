"""Where a model runs."""
from typing import Optional

import torch

from .errors import InputError

__all__ = ['choose_device']


def choose_device(name: Optional[str]) -> torch.device:
    """The device of this name, 'cpu' or 'cuda'; the GPU if there is one where None.

    Raises:
        InputError: There is no GPU.
    """
    device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise InputError(f'device {device} is not to be had on this machine')
    return device
