"""The convolutional network of the method's authors (github.com/ichteltelch/Batchless, example_experiment_CIFAR10.py)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bln_train.models.layers import NormFactory, init_he
from bln_train.norm.dropout import InstanceDropout


class PaperCnn(nn.Module):
    """conv7, conv5, conv3 of 64 channels, each followed by leaky relu, norm, dropout and 2x2 max-pool; two dense layers of
    50, each followed by leaky relu, norm and dropout; a dense layer: (N, 3, S, S) images to (N, num_classes) logits.

    Args:
        image_size: S, pixels.
        dropout: probability, 0.25 in the authors' code; the slope of the leaky relu is Keras's default there, 0.3.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        norm: NormFactory,
        conv: type[nn.Conv2d] = nn.Conv2d,
        image_size: int = 32,
        dropout: float = 0.25,
        slope: float = 0.3,
    ) -> None:
        super().__init__()
        self.slope = slope
        kernels = (7, 5, 3)
        self.convs = nn.ModuleList(conv(3 if i == 0 else 64, 64, k, padding=k // 2) for i, k in enumerate(kernels))
        features = 64 * (image_size // 8) ** 2
        self.denses = nn.ModuleList([nn.Linear(features, 50), nn.Linear(50, 50)])
        self.norms = nn.ModuleList([*(norm(64) for _ in kernels), norm(50, 0), norm(50, 0)])
        self.dropouts = nn.ModuleList(InstanceDropout(dropout, purpose=100 + i) for i in range(5))
        self.fc = nn.Linear(50, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, num_classes)."""
        for i, layer in enumerate((*self.convs, *self.denses)):
            if i == len(self.convs):
                x = x.flatten(1)
            x = self.dropouts[i](self.norms[i](F.leaky_relu(layer(x), self.slope)))
            if i < len(self.convs):
                x = F.max_pool2d(x, 2)
        return self.fc(x)
