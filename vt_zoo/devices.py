"""Devices that models run on, and the processes of a distributed training."""
import os
from typing import Optional

import torch

from .errors import InputError, either

DEVICES = ('cpu', 'cuda', 'mps')


def find_device(name: Optional[str] = None) -> torch.device:
    """Find a device by name; without a name, a GPU if CUDA has one, otherwise the CPU.

    Args:
        name: One of `DEVICES`, with a number to choose among several GPUs, e.g. 'cuda:1'.

    Raises:
        InputError: There is no such device on this machine.
    """
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        if device.type in DEVICES and (device.type != 'cuda' or torch.cuda.is_available()):
            torch.empty(1, device=device)
            return device
    except (RuntimeError, AssertionError, NotImplementedError):  # each type of device raises its own
        pass
    raise InputError(f'device must be {either(DEVICES)} and be on this machine, got {name}')


def is_main_process() -> bool:
    """Whether this is the only process, or the first one of a launcher, which writes files and prints."""
    return os.environ.get('RANK', '0') == '0'
