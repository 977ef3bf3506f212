"""Residual networks for 32x32 images: He et al. (arXiv 1512.03385) and wide ResNets (Zagoruyko & Komodakis, 1605.07146)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bln_train.models.layers import NormFactory, ShortcutA, init_he


class BasicBlock(nn.Module):
    """relu(norm(conv3x3(relu(norm(conv3x3(x))))) + shortcut(x)), as (N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, option: str, norm: NormFactory, conv: type[nn.Conv2d]
    ) -> None:
        super().__init__()
        bias = isinstance(norm(1), nn.Identity)  # a norm's shift makes the convolution's bias redundant
        self.conv1 = conv(in_channels, channels, 3, stride, 1, bias=bias)
        self.norm1 = norm(channels)
        self.conv2 = conv(channels, channels, 3, 1, 1, bias=bias)
        self.norm2 = norm(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            if option == "A":
                self.shortcut = ShortcutA(in_channels, channels, stride)
            else:
                self.shortcut = nn.Sequential(conv(in_channels, channels, 1, stride, bias=bias), norm(channels))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102 - see the class
        # In place, and without a name for the middle: nothing outlives its use, with or without gradients.
        out = self.norm2(self.conv2(F.relu_(self.norm1(self.conv1(x)))))
        return F.relu_(out.add_(self.shortcut(x)))


class CifarResNet(nn.Module):
    """Stem conv3x3, stages of basic blocks, global mean, linear: (N, 3, H, W) images to (N, num_classes) logits.

    Args:
        blocks: number of blocks of each stage; each stage but the first halves the resolution.
        widths: channels of each stage.
        shortcut: "A" zero-padding or "B" 1x1 projection where shapes change.
        norm: makes a norm layer; conv: the convolution class.
        zero_init_residual: start each block's last scale at 0, so that blocks begin as identities.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int,
        *,
        norm: NormFactory,
        conv: type[nn.Conv2d] = nn.Conv2d,
        shortcut: str = "A",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        self.stem = conv(3, widths[0], 3, 1, 1, bias=isinstance(norm(1), nn.Identity))
        self.norm = norm(widths[0])
        stages, channels = [], widths[0]
        for stage, (num_blocks, width) in enumerate(zip(blocks, widths, strict=True)):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(channels, width, stride, shortcut, norm, conv))
                channels = width
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        init_he(self)
        if zero_init_residual:
            for block_module in stages:
                scale = getattr(block_module.norm2, "weight", None)
                if scale is None:
                    raise ValueError("zero_init_residual needs norms with a scale")
                nn.init.zeros_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, num_classes)."""
        x = F.relu_(self.norm(self.stem(x)))
        return self.fc(self.blocks(x).mean((2, 3)))


def _relu(out: Tensor, x: Tensor) -> Tensor:
    """In place, unless `out` is x itself (no norm), which the shortcut still needs."""
    return F.relu(out) if out is x else F.relu_(out)


class WideBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), the pre-activation order; where shapes change the shortcut is a 1x1 conv."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: NormFactory, conv: type[nn.Conv2d]) -> None:
        super().__init__()
        bias = isinstance(norm(1), nn.Identity)
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride, 1, bias=bias)
        self.norm2 = norm(channels)
        self.conv2 = conv(channels, channels, 3, 1, 1, bias=bias)
        changes = stride != 1 or in_channels != channels
        self.shortcut = conv(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        out = _relu(self.norm1(x), x)
        skip = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu_(self.norm2(self.conv1(out)))).add_(skip)


class WideResNet(nn.Module):
    """Wide residual network of depth 6n+4: (N, 3, H, W) images to (N, num_classes) logits."""

    def __init__(
        self, depth: int, width: int, num_classes: int, *, norm: NormFactory, conv: type[nn.Conv2d] = nn.Conv2d
    ) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"a wide ResNet's depth is 6n+4, not {depth}")
        self.stem = conv(3, 16, 3, 1, 1, bias=isinstance(norm(1), nn.Identity))
        stages, channels = [], 16
        for stage, out_channels in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range((depth - 4) // 6):
                stages.append(WideBlock(channels, out_channels, 2 if stage > 0 and block == 0 else 1, norm, conv))
                channels = out_channels
        self.blocks = nn.Sequential(*stages)
        self.norm = norm(channels)
        self.fc = nn.Linear(channels, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, num_classes)."""
        return self.fc(F.relu_(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))
