"""A network of InceptionV3's form that takes no time, in place of torchvision's."""

from __future__ import annotations

from torch import nn
from torchvision.models.inception import BasicConv2d

from pipeline.models.encoder import TRUNK_LAYERS
from pipeline.models.encoder_identity import FEATURE_SIZE


class TinyInception(nn.Module):
    """Layers of torchvision's names, of which three and the pooling do something."""

    def __init__(self, **_: bool) -> None:
        super().__init__()
        for name in TRUNK_LAYERS:
            setattr(self, name, nn.Identity())
        self.Conv2d_1a_3x3 = BasicConv2d(3, 16, kernel_size=32, stride=37)  # 8 x 8 cells
        self.Mixed_7b = BasicConv2d(16, 16, kernel_size=1)
        self.Mixed_7c = BasicConv2d(16, FEATURE_SIZE, kernel_size=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
