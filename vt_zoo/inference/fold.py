"""Folding of norms into the maps before them, exact in eval mode."""
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
    """A weight in float64, on the CPU where its device has none."""
    weight = weight.detach()
    return (weight.cpu() if weight.device.type == 'mps' else weight).double()


def runs_alone(module: nn.Module) -> bool:
    """Whether no hook and no replaced forward, as pruning or offloading bring, acts on what a module computes."""
    return not (module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module))


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's weights alone say what it computes, so that its norm can be folded into it.

    Not so with adapters, parametrizations, pruning, quantised weights, offloading or hooks: such a layer stays.
    """
    return (
        type(layer) in (nn.Conv2d, nn.Linear) and runs_alone(layer)
        and isinstance(layer.weight, nn.Parameter) and type(layer.weight.data) is torch.Tensor)


def fixed_affine(norm: nn.Module) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
    """Scale and shift (C), in float64, that a norm is in eval mode.

    Returns:
        Both, or None where it is not one and the same affine map for every input, as with a group norm, a batch norm
        without running statistics and a norm with an activation.
    """
    return _affine(norm) if isinstance(getattr(norm, 'act', None), (nn.Identity, type(None))) else None


def _affine(norm: nn.Module) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
    """As `fixed_affine`, of what comes before an activation."""
    if not isinstance(norm, FOLDABLE) or norm.running_mean is None or not runs_alone(norm) or is_parametrized(norm):
        return None
    scale = (in_float64(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * in_float64(norm.weight)
    shift = -in_float64(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + in_float64(norm.bias)


def new_parameter(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """A parameter of the type and on the device of another tensor."""
    return nn.Parameter(value.to(like.device, like.dtype, copy=True))


def fold_norm(layer: nn.Module, norm: nn.Module) -> Optional[nn.Module]:
    """The layer, nn.Conv2d or nn.Linear, with the norm of its output folded in.

    Returns:
        A new layer, or None where the layer is not plain or the norm no fixed affine map.
    """
    affine = fixed_affine(norm)
    return scaled(layer, *affine) if affine is not None and is_plain(layer) else None


def scaled(layer: nn.Module, scale: torch.Tensor, shift: torch.Tensor) -> nn.Module:
    """The layer with a scale and a shift (C_out) of its output, given in float64."""
    scaled = copy.deepcopy(layer)
    rows = scale.view(-1, *[1] * (layer.weight.ndim - 1))
    scaled.weight = new_parameter(in_float64(layer.weight) * rows, layer.weight)
    bias = shift if layer.bias is None else shift + scale * in_float64(layer.bias)
    scaled.bias = new_parameter(bias, layer.weight)
    return scaled


class _Tracer(torch.fx.Tracer):
    """Looks into all but norms, torch's own modules and `leaves`; `failed` is the innermost module that raised."""

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
    """Nodes of a model, and the modules that lie in parts which torch.fx cannot trace, each of them one node.

    No nodes where the model's own `forward` cannot be traced.
    """
    leaves: List[nn.Module] = []
    while True:
        tracer = _Tracer(leaves)
        try:
            nodes = list(tracer.trace(model).nodes)
        except Exception:  # of which kind depends on what the model does
            if tracer.failed is None or tracer.failed in leaves:
                return [], set()
            leaves.append(tracer.failed)
        else:
            return nodes, {module for leaf in leaves for module in leaf.modules()}


def fold_norms(model: nn.Module) -> None:
    """Fold each batch norm that takes a convolution's output, and nothing else does, into that convolution, in place.

    Of a norm with an activation the activation stays. Convolutions are nn.Conv2d; other layers keep their norms. Which
    ones these are is read from a trace of the model. Modules that torch.fx cannot trace stay as they are.
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
