"""Folding norms into the maps before them, which is exact in eval mode."""
import copy
from collections import Counter
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import torch
import torch.fx
import torch.nn as nn
from timm.layers import FrozenBatchNormAct2d
from timm.layers.norm_act import FrozenBatchNorm2d
from torch.nn.utils.parametrize import is_parametrized

__all__ = ['fold_norms']

FOLDABLE = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d)


def in_float64(weight: torch.Tensor) -> torch.Tensor:
    """Convert a weight to float64, on the CPU if its device does not support it."""
    weight = weight.detach()
    return (weight.cpu() if weight.device.type == 'mps' else weight).double()


def runs_alone(module: nn.Module) -> bool:
    """Whether a module runs without hooks and without a replaced `forward`, such as pruning or offloading add."""
    return not (module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module))


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's weights alone determine what it computes, so that its norm can be folded into it.

    This is not the case with adapters, parametrizations, pruning, quantised weights, offloading or hooks: such a layer
    stays as it is.
    """
    return (
        type(layer) in (nn.Conv2d, nn.Linear) and runs_alone(layer)
        and isinstance(layer.weight, nn.Parameter) and type(layer.weight.data) is torch.Tensor)


def fixed_affine(norm: nn.Module) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
    """Scale and shift (C), in float64, that a norm applies in eval mode.

    Returns:
        Both, or None if the norm is not the same affine map for every input, as is the case for a group norm, a batch
        norm without running statistics and a norm with an activation.
    """
    return _affine(norm) if isinstance(getattr(norm, 'act', None), (nn.Identity, type(None))) else None


def _affine(norm: nn.Module) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
    """Like `fixed_affine`, but for a norm with an activation, return the part before the activation."""
    if not isinstance(norm, FOLDABLE) or norm.running_mean is None or not runs_alone(norm) or is_parametrized(norm):
        return None
    scale = (in_float64(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * in_float64(norm.weight)
    shift = -in_float64(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + in_float64(norm.bias)


def new_parameter(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """Create a parameter with the type and device of another tensor."""
    return nn.Parameter(value.to(like.device, like.dtype, copy=True))


def fold_norm(layer: nn.Module, norm: nn.Module) -> Optional[nn.Module]:
    """Fold the norm of its output into a layer, nn.Conv2d or nn.Linear.

    Returns:
        A new layer, or None if the layer is not plain or the norm is not a fixed affine map.
    """
    affine = fixed_affine(norm)
    return scaled(layer, *affine) if affine is not None and is_plain(layer) else None


def scaled(layer: nn.Module, scale: torch.Tensor, shift: torch.Tensor) -> nn.Module:
    """Copy a layer, with a scale and a shift (C_out) of its output, given in float64, folded in."""
    scaled = copy.deepcopy(layer)
    rows = scale.view(-1, *[1] * (layer.weight.ndim - 1))
    scaled.weight = new_parameter(in_float64(layer.weight) * rows, layer.weight)
    bias = shift if layer.bias is None else shift + scale * in_float64(layer.bias)
    scaled.bias = new_parameter(bias, layer.weight)
    return scaled


class _Tracer(torch.fx.Tracer):
    """Tracer that enters all modules but norms, torch's own and `leaves`; `failed` is the innermost one that raised."""

    def __init__(self, leaves: List[nn.Module]) -> None:
        super().__init__()
        self.leaves, self.failed = leaves, None

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, FOLDABLE) or m in self.leaves or super().is_leaf_module(m, qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: Tuple, kwargs: Dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m  # the innermost one comes first
            raise


def _trace(model: nn.Module) -> Tuple[List[torch.fx.Node], Set[nn.Module]]:
    """Trace a model.

    Returns:
        The nodes, and all modules in parts that torch.fx cannot trace, each of which is a single node. There are no
        nodes if the model's own `forward` cannot be traced.
    """
    leaves: List[nn.Module] = []
    while True:
        tracer = _Tracer(leaves)
        try:
            nodes = list(tracer.trace(model).nodes)
        except Exception:  # its type depends on what the model does
            if tracer.failed is None or tracer.failed in leaves:
                return [], set()
            leaves.append(tracer.failed)
        else:
            return nodes, {module for leaf in leaves for module in leaf.modules()}


def fold_norms(model: nn.Module) -> None:
    """Fold each batch norm that is the only user of a convolution's output into that convolution, in place.

    If a norm has an activation, the activation stays. Only nn.Conv2d is folded into; other layers keep their norms. A
    trace of the model tells which norm follows which convolution; modules that torch.fx cannot trace stay as they are.
    """
    traced = copy.deepcopy(model).eval()
    if hasattr(traced, 'set_grad_checkpointing'):
        traced.set_grad_checkpointing(False)
    nodes, untraced = _trace(traced)
    calls = Counter(node.target for node in nodes if node.op == 'call_module')
    read = {node.target.rpartition('.')[0] for node in nodes if node.op == 'get_attr'}  # weights used elsewhere
    replaced = {}
    for node in nodes:
        source = node.args[0] if node.op == 'call_module' and node.args else None
        if not isinstance(source, torch.fx.Node) or source.op != 'call_module' or len(source.users) > 1:
            continue
        if untraced.intersection((traced.get_submodule(source.target), traced.get_submodule(node.target))):
            continue
        conv, norm = model.get_submodule(source.target), model.get_submodule(node.target)
        affine = _affine(norm)
        once = calls[source.target] == calls[node.target] == 1 and not read.intersection((source.target, node.target))
        if isinstance(conv, nn.Conv2d) and is_plain(conv) and affine is not None and once:
            replaced[source.target] = scaled(conv, *affine)
            replaced[node.target] = getattr(norm, 'act', nn.Identity().train(norm.training))
    for name, module in replaced.items():
        _replace(model, name, module)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, module)
