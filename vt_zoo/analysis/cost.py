"""Counting the parameters and multiply-adds of modules."""
from typing import Tuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count_multiply_adds', 'count_weights']


def count_weights(model: nn.Module) -> int:
    """Count weights as the paper does, without norms and biases: only parameters with at least two dimensions."""
    return sum(p.numel() for p in model.parameters() if p.ndim > 1)


def count_multiply_adds(model: nn.Module, input_size: Tuple[int, int, int] = (3, 224, 224)) -> int:
    """Count the multiply-adds of convolutions and matrix products for one image, which the paper calls FLOPs.

    Args:
        model: Model on any device; on 'meta', counting takes no arithmetic.
        input_size: (C, H, W) of the image.

    Returns:
        Multiply-adds, half of what torch's flop counter counts.
    """
    parameter = next(model.parameters())
    training = [module for module in model.modules() if module.training]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    for module in training:
        module.training = True
    return counter.get_total_flops() // 2
