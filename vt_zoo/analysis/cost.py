"""Counting parameters and multiply-adds of real modules."""
from typing import Tuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count_multiply_adds', 'count_weights']


def count_weights(model: nn.Module) -> int:
    """Count weights the paper's way: without norms and biases, that is parameters of two dimensions and more."""
    return sum(p.numel() for p in model.parameters() if p.ndim > 1)


def count_multiply_adds(model: nn.Module, input_size: Tuple[int, int, int] = (3, 224, 224)) -> int:
    """Count multiply-adds of convolutions and matrix products for one image; the paper calls them FLOPs.

    Args:
        model: Model on any device; on 'meta' the count costs no arithmetic.
        input_size: (C, H, W) of the image.

    Returns:
        Multiply-adds, half of what torch's flop counter counts.
    """
    parameter = next(model.parameters())
    training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    return counter.get_total_flops() // 2
