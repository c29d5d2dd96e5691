"""K-means over the pixels of each image, for the clustering tokenizer (appendix C of the paper)."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def _nearest(products: torch.Tensor) -> torch.Tensor:
    """Index (B, 1, H*W) of the largest of the products (B, L, H*W); the first one in case of a tie.

    If the map has fewer rows than the grid of initial centroids, some centroids are equal. Their products then differ
    only by rounding, which varies from batch to batch.
    """
    top = products.amax(dim=1, keepdim=True)
    tie = 2e-6
    if products.dtype == torch.float64:
        tie = 1e-12
    elif products.dtype in (torch.float16, torch.bfloat16):
        tie = 0.01
    return (products >= top - tie).to(torch.uint8).argmax(dim=1, keepdim=True)


torch.fx.wrap('_nearest')


class KMeans(nn.Module):
    """Spherical k-means: pixels and centroids have unit length, and the nearest centroid has the largest dot product.

    It is deterministic: centroids start from the down-sampled map and are refined by a fixed number of Lloyd's
    iterations. A centroid that is nearest to no pixel stays where it is. No gradients flow through it.
    """

    def __init__(self, num_tokens: int, iterations: int = 5) -> None:
        """
        Args:
            num_tokens: Number of centroids L.
            iterations: Number of Lloyd's iterations. The paper gives none; on 14x14 maps, few pixels change after 5.
        """
        super().__init__()
        self.side = math.isqrt(num_tokens - 1) + 1  # side of the smallest square grid with at least L cells
        self.cells = [i * self.side ** 2 // num_tokens for i in range(num_tokens)]
        self.iterations = iterations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Cluster the pixels.

        Args:
            x: Feature map (B, C, H, W).

        Returns:
            Centroids of unit length (B, L, C).
        """
        with torch.no_grad():
            cells = F.interpolate(x, size=(self.side, self.side), mode='bilinear', align_corners=False).flatten(2)
            centroids = F.normalize(cells[:, :, self.cells].transpose(1, 2), dim=-1)
            pixels = F.normalize(x.flatten(2), dim=1)  # (B, C, H*W)
            for _ in range(self.iterations):
                products = centroids @ pixels
                nearest = _nearest(products)  # (B, 1, H*W)
                members = torch.zeros_like(products).scatter(1, nearest, 1.)  # (B, L, H*W)
                sums = (members @ pixels.transpose(1, 2)).to(centroids.dtype)
                some = sums.abs().amax(-1, keepdim=True) > 0  # False if a cluster is empty or all black
                centroids = torch.where(some, F.normalize(sums, dim=-1), centroids)
        return centroids
