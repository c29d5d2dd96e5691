"""What a model's VT modules attend to, for given images."""
from dataclasses import dataclass
from typing import Dict, List, Optional

import torch
import torch.nn as nn

from vt_zoo.layers import TokenModule, VTModule

__all__ = ['VTRecord', 'capture']

PARTS = ('tokenizer', 'transformer', 'projector')


@dataclass
class VTRecord:
    """Attention of one VT module for B images, with a feature map of H x W pixels and L tokens of CT channels.

    A part that the module does not have, or that has no attention, leaves None. Heads are averaged.

    Attributes:
        attention: A of the tokenizer, equations (1) and (2): share of each pixel in each token (B, L, H, W), sums to
            one over the pixels. None with a pooling tokenizer and in modules that work on tokens only.
        relation: Attention of the transformer, equation (3): share of token l' in token l (B, L, L), sums to one over
            l'. None with the other token mixers.
        projection: Attention of the projector, equation (5): share of each token in each pixel (B, L, H, W), sums to
            one over the tokens. None where the module has no projector.
        tokens: The tokens that the module returns (B, L, CT).
    """
    attention: Optional[torch.Tensor]
    relation: Optional[torch.Tensor]
    projection: Optional[torch.Tensor]
    tokens: torch.Tensor


@torch.no_grad()
def capture(model: nn.Module, images: torch.Tensor) -> List[VTRecord]:
    """Run a model on images and record the attention of its VT modules.

    Args:
        model: Model with VT modules, not compiled or scripted: the record is taken by hooks on its parts, which are
            gone afterwards. It runs in the mode that it is in (eval for reproducible results).
        images: Images (B, C, H, W), preprocessed as the model asks.

    Returns:
        One record a VT module, in the order of their use.

    Raises:
        ValueError: The model has no VT modules.
    """
    modules = [m for m in model.modules() if isinstance(m, (VTModule, TokenModule))]
    if not modules:
        raise ValueError(f'model must have VT modules, {type(model).__name__} has none')
    records: List[VTRecord] = []
    caught: Dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(_, inputs, output):
            caught[name] = output
        return hook

    def record(_, inputs, output):
        size = inputs[0].shape[-2:]
        attention, relation, projection = (caught.pop(part, None) for part in PARTS)
        records.append(VTRecord(
            attention=None if attention is None else attention.unflatten(-1, size),
            relation=None if relation is None else relation.mean(1),
            projection=None if projection is None else projection.mean(1).unflatten(-1, size),
            tokens=output[1],
        ))

    handles = []
    try:
        for module in modules:
            for part in PARTS:
                softmax = getattr(getattr(module, part, None), 'softmax', None)
                if softmax is not None:
                    handles.append(softmax.register_forward_hook(keep(part)))
            handles.append(module.register_forward_hook(record))
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return records
