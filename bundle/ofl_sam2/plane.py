"""A slice <-> the network's square input: aspect kept in mm, centred, zero-padded."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PlaneGeometry:
    """How a slice of `shape` pixels lies in a square of `size` pixels.

    Pixels are made square in mm, the longer side fills the square, the shorter one is centred.

    Attributes:
        shape: (H, W) of the slice in pixels.
        spacing: (row, column) pixel spacing in mm.
        size: side of the square input in pixels.

    Example:
        >>> geometry = PlaneGeometry(shape=(20, 40), spacing=(1.0, 1.0), size=64)
        >>> geometry.to_input(torch.ones(1, 20, 40)).shape
        torch.Size([1, 1, 64, 64])
        >>> geometry.from_input(torch.zeros(2, 16, 16)).shape
        torch.Size([2, 20, 40])
    """

    shape: tuple[int, int]
    spacing: tuple[float, float]
    size: int

    @property
    def content(self) -> tuple[int, int, int, int]:
        """Where the slice lies in the square: (top, left, height, width) in input pixels."""
        extent = (self.shape[0] * self.spacing[0], self.shape[1] * self.spacing[1])
        height, width = (max(1, round(side * self.size / max(extent))) for side in extent)
        return (self.size - height) // 2, (self.size - width) // 2, height, width

    def to_input(self, images: Tensor) -> Tensor:
        """Resize slices `(N, H, W)` or `(N, C, H, W)` to inputs `(N, C, size, size)`, bilinear and antialiased."""
        top, left, height, width = self.content
        images = images if images.ndim == 4 else images[:, None]
        resized = F.interpolate(images.float(), (height, width), mode="bilinear", antialias=True)
        return F.pad(resized, (left, self.size - left - width, top, self.size - top - height))

    def from_input(self, maps: Tensor) -> Tensor:
        """Resample maps back to the slice grid, bilinear at the pixel centres.

        Args:
            maps: `(K, h, w)` at any resolution, covering the input square.

        Returns:
            `(K, H, W)`, float32.
        """
        top, left, height, width = self.content
        rows = self._sample_points(self.shape[0], top, height, maps.shape[1])
        columns = self._sample_points(self.shape[1], left, width, maps.shape[2])
        x, y = torch.meshgrid(columns, rows, indexing="xy")
        grid = torch.stack([x, y], dim=-1)[None].to(maps.device)
        return F.grid_sample(maps[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)[0]

    def _sample_points(self, count: int, start: int, length: int, pixels: int) -> Tensor:
        """Centres of `count` slice pixels in map coordinates [-1, 1], `(count,)`.

        They stay half a map pixel inside the content, so that the padding does not bleed into the edge of the slice.
        """
        scale = pixels / self.size
        low, high = start * scale + 0.5, (start + length) * scale - 0.5
        middle = (low + high) / 2
        centres = (start + (torch.arange(count, dtype=torch.float64) + 0.5) * length / count) * scale
        return (centres.clamp(min(low, middle), max(high, middle)) * 2 / pixels - 1).float()
