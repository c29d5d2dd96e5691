"""Position code of a token: where its pixels are (first version of the paper)."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerType

from .linear import TokenLinear


class PositionCode(nn.Module):
    """Encode the token coefficients A: down-sample them to a fixed grid, then compress them by a linear map.

    The down-sampling makes the code independent of the input's size.
    """

    DIM = 64  # channels of the code; the summaries of the first version give no number
    GRID = 8  # cells along each side of the down-sampled A

    def __init__(self, norm_layer: LayerType = nn.BatchNorm2d, device=None, dtype=None) -> None:
        """
        Args:
            norm_layer: Norm after the linear map.
        """
        super().__init__()
        self.size = (self.GRID, self.GRID)
        self.linear = TokenLinear(self.GRID ** 2, self.DIM, norm_layer=norm_layer, device=device, dtype=dtype)

    def forward(self, attn: torch.Tensor) -> torch.Tensor:
        """Encode token coefficients A (B, L, H, W), which sum to one over the pixels, as (B, L, 64)."""
        cells = F.interpolate(attn, size=self.size, mode='bilinear', align_corners=False).flatten(2)
        return self.linear(cells * (attn.shape[2] * attn.shape[3]))  # uniform A gives ones
