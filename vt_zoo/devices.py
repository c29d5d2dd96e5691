"""Devices that models run on, and processes that train one together."""
import os
from typing import Optional

import torch

from .errors import InputError

DEVICES = ('cpu', 'cuda', 'mps')


def find_device(name: Optional[str] = None) -> torch.device:
    """The device of a name, or where it is None a GPU if CUDA has one, else the CPU.

    Args:
        name: One of `DEVICES`, of several GPUs with a number, as 'cuda:1'.

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
    except (RuntimeError, AssertionError, NotImplementedError):  # each kind its own
        pass
    raise InputError(f'device must be {", ".join(DEVICES[:-1])} or {DEVICES[-1]} and be on this machine, got {name}')


def is_main_process() -> bool:
    """Whether this is the first, or the only one, of the processes of a launcher: the one that writes and speaks."""
    return os.environ.get('RANK', '0') == '0'
