"""Decoders of VT-FPN and the panoptic FPN: a neck that relates the pyramid's levels, followed by the same head.

See section 4 and Figure 4 of the paper for semantic segmentation. The FPN's neck is Detectron2's, with 3x3 output
convolutions; VT-FPN's is `vt_zoo.layers.VTNeck`.
"""
from typing import List, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['FPNNeck', 'PanopticDecoder']


class FPNNeck(nn.Module):
    """Neck of the FPN: 1x1 laterals, a top-down sum, and a 3x3 output convolution at each level."""

    def __init__(self, in_chs: Sequence[int], pyramid_channels: int = 256) -> None:
        """
        Args:
            in_chs: Channels of the encoder's maps, from fine to coarse.
            pyramid_channels: Channels of each level. Detectron2 uses 256.
        """
        super().__init__()
        self.laterals = nn.ModuleList([nn.Conv2d(chs, pyramid_channels, 1) for chs in in_chs])
        self.outputs = nn.ModuleList([nn.Conv2d(pyramid_channels, pyramid_channels, 3, padding=1) for _ in in_chs])
        for conv in (*self.laterals, *self.outputs):
            nn.init.kaiming_uniform_(conv.weight, a=1)  # Detectron2's "Xavier" initialization
            nn.init.zeros_(conv.bias)

    def forward(self, features: List[torch.Tensor]) -> List[torch.Tensor]:
        """Turn the encoder's maps (B, C_i, H_i, W_i), from fine to coarse, into levels (B, C, H_i, W_i)."""
        maps = [lateral(features[i]) for i, lateral in enumerate(self.laterals)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size=maps[i - 1].shape[-2:], mode='nearest')
        return [output(maps[i]) for i, output in enumerate(self.outputs)]


class PanopticDecoder(nn.Module):
    """A neck and the head of the panoptic FPN, which brings all levels to the size of the finest one and sums them.

    A level of n times the finest stride goes through log2(n) blocks (at least one) of a 3x3 convolution, group norm and
    ReLU. At all levels but the finest, each block is followed by bilinear upsampling to the size of the next finer
    level.
    """

    def __init__(self, neck: nn.Module, num_levels: int, pyramid_channels: int = 256, head_channels: int = 128) -> None:
        """
        Args:
            neck: Module that turns the encoder's maps into levels.
            num_levels: Number of levels.
            pyramid_channels: Channels of each level.
            head_channels: Channels of the output. Detectron2 uses 128, and 32 groups in the norm.
        """
        super().__init__()
        self.neck = neck
        self.num_levels = num_levels
        self.out_channels = head_channels
        self.heads = nn.ModuleList()
        for level in range(num_levels):
            blocks = [
                nn.Sequential(
                    nn.Conv2d(pyramid_channels if i == 0 else head_channels, head_channels, 3, padding=1, bias=False),
                    nn.GroupNorm(32, head_channels),
                    nn.ReLU(inplace=True),
                ) for i in range(max(level, 1))]
            self.heads.append(nn.ModuleList(blocks))
        for m in self.heads.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, features: List[torch.Tensor]) -> torch.Tensor:
        """Decode the encoder's maps, from fine to coarse, into one map (B, C, H, W) of the finest level's size.

        If there are more maps than levels, the last ones are used, as in segmentation_models_pytorch.
        """
        levels = self.neck(features[-self.num_levels:])
        sizes = [x.shape[-2:] for x in levels]
        out = levels[0]  # replaced by the first head's output; TorchScript must know its type
        for level, head in enumerate(self.heads):
            x = levels[level]
            for i, block in enumerate(head):
                x = block(x)
                if level > 0:
                    x = F.interpolate(x, size=sizes[level - 1 - i], mode='bilinear', align_corners=False)
            out = x if level == 0 else out + x
        return out
