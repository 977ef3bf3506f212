"""Batched augmentation and normalisation of uint8 images, on the device that trains.

What is drawn for an image is a function of its seed (see `system/rng.py`), so no split of a batch can change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bln_train.system.rng import draw_integers

FLIP_AND_CROP, CUTOUT = 101, 102  # purposes of the draws, in the sense of `rng.draw_uniform`


class Preprocess:
    """Augment and normalise uint8 images in batches on their device: mirror, crop, cut out, standardise.

        out = (crop(mirror(x)) / 255 - mean) / std, and 0 (the channel mean) inside the cut-out square

    Each image's result is a function of the image and its seed alone, bitwise, so it is the same in every micro-batch;
    nothing waits for the device. Crops are of the reflect-padded image. Cutout: a square around a uniform centre,
    clipped at the border (DeVries & Taylor 2017).

    Args:
        mean: (3,) of pixel / 255.
        std: (3,) of pixel / 255, above 0.
        flip: mirror left-right with probability 1/2.
        crop_padding: pixels of reflected border from which the crop may start; 0 is off.
        cutout: side of the square in pixels; 0 is off.
        dtype: of the result; below float32 it is rounded from float32.
        channels_last: memory format of the result.

    Raises ValueError for a std that is not positive, or a crop_padding not below the side of the images.
    """

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        *,
        flip: bool = False,
        crop_padding: int = 0,
        cutout: int = 0,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        if not bool((std > 0).all()):
            raise ValueError(f"std must be above 0, not {std.tolist()}")
        self.mean, self.std = mean, std
        self.num_mirrors = 2 if flip else 1
        self.crop_padding = crop_padding
        self.cutout = cutout
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._moments: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._tables: dict[tuple[torch.device, int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def prepare(self, device: torch.device, height: int, width: int) -> None:
        """Make the tables of images of a size on a device now and not with the first of them; they stay."""
        self._tables_of(device, height, width)
        self._normalize(torch.empty(0, 3, height, width, device=device))

    def train(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Augment and normalise: images (n, 3, H, W) uint8 and seeds (n,) int64 on one device to (n, 3, H, W)."""
        n, channels, height, width = images.shape
        # At n = 1 each operation costs its launch: tables instead of arithmetic, one joint draw per purpose.
        rows, columns, hit_rows, hit_columns = self._tables_of(images.device, height, width)
        if len(rows) * len(columns) > 1:
            place = draw_integers(seeds, FLIP_AND_CROP, len(rows) * len(columns))
            row = rows.index_select(0, place // len(columns))
            column = columns.index_select(0, place % len(columns))
            source = (row.unsqueeze(2) + column.unsqueeze(1)).view(n, 1, -1).expand(n, channels, -1)
            images = images.reshape(n, channels, -1).gather(2, source).view(n, channels, height, width)
        out = self._normalize(images)
        if self.cutout:
            centre = draw_integers(seeds, CUTOUT, height * width)
            hit_row = hit_rows.index_select(0, centre // width)
            hit_column = hit_columns.index_select(0, centre % width)
            out.masked_fill_((hit_row.unsqueeze(2) & hit_column.unsqueeze(1)).unsqueeze(1), 0.0)
        return out.to(self.dtype, memory_format=self.memory_format)

    def test(self, images: Tensor) -> Tensor:
        """Normalise only: (n, 3, H, W) uint8 to the same shape in `dtype`."""
        return self._normalize(images).to(self.dtype, memory_format=self.memory_format)

    def _normalize(self, images: Tensor) -> Tensor:
        if images.device not in self._moments:
            working = torch.promote_types(self.dtype, torch.float32)
            mean, std = ((255 * x).to(images.device, working).view(-1, 1, 1) for x in (self.mean, self.std))
            self._moments[images.device] = mean, std
        mean, std = self._moments[images.device]
        # Two operations that round exactly, not one fused: vector and tail elements of a kernel then agree bitwise.
        return (images - mean).div_(std)

    def _tables_of(self, device: torch.device, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each draw: source row (times width) of each row, source column of each column; rows, columns cut out."""
        key = (device, height, width)
        if key not in self._tables:
            if self.crop_padding >= min(height, width):
                raise ValueError(f"crop_padding {self.crop_padding} must be below the side of {height}x{width} images")
            shifts = torch.arange(-self.crop_padding, self.crop_padding + 1).unsqueeze(1)
            rows = _reflect(shifts + torch.arange(height), height) * width
            columns = _reflect(shifts + torch.arange(width), width)
            if self.num_mirrors == 2:
                columns = torch.cat([columns, columns.flip(1)])
            offsets = [torch.arange(side) - torch.arange(side).unsqueeze(1) + self.cutout // 2 for side in key[1:]]
            hits = [(offset >= 0) & (offset < self.cutout) for offset in offsets]
            self._tables[key] = (rows.to(device), columns.to(device), hits[0].to(device), hits[1].to(device))
        return self._tables[key]


def _reflect(index: Tensor, side: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= side, 2 * (side - 1) - index, index)
