"""Recording what the tokens of a model attend to in given images."""
from dataclasses import dataclass
from typing import Dict, List, Optional

import torch
import torch.nn as nn

from vt_zoo.layers import TokenModule, VTModule, VTNeck

__all__ = ['VTRecord', 'capture_tokens']


@dataclass(eq=False)
class VTRecord:
    """Attention of one VT module for B images, with a feature map of H x W pixels and L tokens of CT channels.

    A field is None if the module lacks that part, or if the part has no attention. Heads are averaged. VT-FPN has one
    record per level, from fine to coarse, but a single transformer: each record has its whole relation, whose rows and
    columns are the tokens of the first level, then those of the second, and so on.

    Attributes:
        attention: A of the tokenizer, equations (1) and (2): share of each pixel in each token (B, L, H, W), which sums
            to one over the pixels. None with a pooling tokenizer and in modules that work on tokens only.
        relation: W, the attention of the transformer, equation (3): share of token l' in token l (B, L, L), which sums
            to one over l'; for VT-FPN, over the tokens of all levels. None with the other token mixers.
        projection: Attention of the projector, equation (5): share of each token in each pixel (B, L, H, W), which sums
            to one over the tokens. None if the module has no projector.
        tokens: Tokens (B, L, CT) that the module returns, or that VT-FPN writes back to the level.
    """
    attention: Optional[torch.Tensor]
    relation: Optional[torch.Tensor]
    projection: Optional[torch.Tensor]
    tokens: torch.Tensor


@torch.no_grad()
def capture_tokens(model: nn.Module, images: torch.Tensor) -> List[VTRecord]:
    """Run a model on images and record the attention of its VT modules.

    Args:
        model: Model with VT modules, which may be wrapped in DistributedDataParallel. It runs in its current mode (use
            eval for reproducible results), with hooks on its parts that are removed afterwards. A compiled model runs
            uncompiled for this; one that was scripted, traced or exported cannot be used.
        images: Images (B, C, H, W), preprocessed as the model expects.

    Returns:
        One record per VT module, in the order in which they run; for VT-FPN, one per level.

    Raises:
        ValueError: The model has no VT modules, or is scripted.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError('model must be an eager or compiled module, got a scripted one')
    model = getattr(model, '_orig_mod', model)
    owners = [m for m in model.modules() if isinstance(m, (VTModule, TokenModule, VTNeck))]
    if not owners:
        raise ValueError(f'model must have VT modules, {type(model).__name__} has none')
    records: List[VTRecord] = []
    outputs: Dict[nn.Module, torch.Tensor] = {}

    def keep(module, inputs, output):
        outputs[module] = output

    def mean_of_heads(part):
        attn = outputs.pop(getattr(part, 'softmax', None), None)  # (B * heads, L, ...)
        return None if attn is None else attn.unflatten(0, (-1, getattr(part, 'num_heads', 1))).mean(1)

    def record_module(module, inputs, output):
        attention, relation, projection = (
            mean_of_heads(getattr(module, name, None)) for name in ('tokenizer', 'transformer', 'projector'))
        records.append(_record(attention, relation, projection, inputs[0].shape[-2:], output[1]))

    def record_neck(neck, inputs, output):
        relation = mean_of_heads(neck.transformer)
        tokens = outputs.pop(neck.transformer).split(neck.num_tokens, dim=1)
        for tokenizer, projector, x, t in zip(neck.tokenizers, neck.projectors, inputs[0], tokens):
            records.append(_record(
                mean_of_heads(tokenizer), relation, mean_of_heads(projector), x.shape[-2:], t))

    handles = []
    try:
        for owner in owners:
            for module in owner.modules():
                if isinstance(module, nn.Softmax):
                    handles.append(module.register_forward_hook(keep))
            if isinstance(owner, VTNeck):
                handles.append(owner.transformer.register_forward_hook(keep))
                handles.append(owner.register_forward_hook(record_neck))
            else:
                handles.append(owner.register_forward_hook(record_module))
        with torch.compiler.set_stance('force_eager'):  # modules compiled in place run eagerly
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return records


def _record(attention, relation, projection, size, tokens) -> VTRecord:
    return VTRecord(
        attention=None if attention is None else attention.unflatten(-1, size),
        relation=relation,
        projection=None if projection is None else projection.unflatten(-1, size),
        tokens=tokens,
    )
