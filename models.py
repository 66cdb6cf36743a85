"""The networks of the paper and of its baselines, by name. Each maps images (B, 3, 32, 32) in [0, 1] to logits (B, C).
None normalises its input. Keys and initialisation are those of the authors' releases, so published weights load.

    from models import build_model
    target = build_model("wrn34-10", num_classes=10)

This file needs nothing but torch.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relu(x: Tensor) -> Tensor:
    """max(x, 0), written over x. Here x is BatchNorm's output: nothing else reads it, not even BatchNorm's backward."""
    return F.relu(x, inplace=True)


class Classifier(nn.Linear):
    """w x + b, in the precision of w also under autocast. Losses, and the attack's differences between logits, need
    more than the 8 significant bits of bf16."""

    def forward(self, features: Tensor) -> Tensor:
        features = features.to(self.weight.dtype)
        if features.is_meta:  # shapes alone: torch.autocast does not know this device
            return F.linear(features, self.weight, self.bias)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features, self.weight, self.bias)


class BasicBlock(nn.Module):
    """Post-activation residual block: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""

    # For speed.py: pairs of a convolution and the BatchNorm that alone reads its output. The same in other classes.
    conv_bn = (("conv1", "bn1"), ("conv2", "bn2"), ("shortcut.0", "shortcut.1"))

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(out)).add_(self.shortcut(x)))


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 images (He et al., 2016). `strides` are those of the four stages.

    1, 2, 2, 2 is the usual network (TRADES and MART, resnet.py). 1, 1, 2, 2 is the guide of LBGAT's and DYNAT's
    releases (resnetcifar.py): the same keys and shapes, but another function, with 3.2 times the work.
    """

    conv_bn = (("conv1", "bn1"),)

    def __init__(self, num_classes: int, strides: tuple[int, ...] = (1, 2, 2, 2)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, strides[0]), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, strides[1]), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, strides[2]), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, strides[3]), BasicBlock(512, 512, 1))
        self.linear = Classifier(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))  # (B, 64, 32, 32)
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))  # (B, 512, 4, 4), or 8 x 8
        return self.linear(out.mean((2, 3)))  # (B, C)


class PreActBlock(nn.Module):
    """Pre-activation residual block: conv2(relu(bn2(conv1(out)))) + shortcut, with out = relu(bn1(x)). A shortcut with
    a convolution reads out, the identity reads x."""

    conv_bn = (("conv1", "bn2"),)

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(relu(self.bn2(self.conv1(out)))).add_(shortcut)


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 with a final BatchNorm (Rice et al., 2020; AWP, AT_AWP/preactresnet.py)."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(64, 64, 1), PreActBlock(64, 64, 1))
        self.layer2 = nn.Sequential(PreActBlock(64, 128, 2), PreActBlock(128, 128, 1))
        self.layer3 = nn.Sequential(PreActBlock(128, 256, 2), PreActBlock(256, 256, 1))
        self.layer4 = nn.Sequential(PreActBlock(256, 512, 2), PreActBlock(512, 512, 1))
        self.bn = nn.BatchNorm2d(512)
        self.linear = Classifier(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))  # (B, 512, 4, 4)
        return self.linear(relu(self.bn(out)).mean((2, 3)))  # (B, C)


class WideBlock(nn.Module):
    """Wide residual block: as PreActBlock, with the releases' key for the shortcut."""

    conv_bn = (("conv1", "bn2"),)

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut = None  # the releases' spelling
        if stride != 1 or width_in != width:
            self.convShortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return self.conv2(relu(self.bn2(self.conv1(out)))).add_(shortcut)


class WideStage(nn.Module):
    """`depth` wide blocks. The first one changes width and stride. This class gives the key `block1.layer.0...`."""

    def __init__(self, depth: int, width_in: int, width: int, stride: int):
        super().__init__()
        first = WideBlock(width_in, width, stride)
        self.layer = nn.Sequential(first, *(WideBlock(width, width, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-widen (Zagoruyko and Komodakis, 2016; TRADES, wideresnet.py), without `sub_block1`, never called."""

    def __init__(self, num_classes: int, depth: int, widen: int):
        super().__init__()
        blocks = (depth - 4) // 6  # per stage
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(blocks, 16, 16 * widen, 1)
        self.block2 = WideStage(blocks, 16 * widen, 32 * widen, 2)
        self.block3 = WideStage(blocks, 32 * widen, 64 * widen, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = Classifier(64 * widen, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))  # (B, 64 * widen, 8, 8)
        return self.fc(relu(self.bn1(out)).mean((2, 3)))  # (B, C)


class CNN(nn.Module):
    """Three strided convolutions with BatchNorm, `widen` times 16, 32 and 64 wide: for CPUs and the tests."""

    conv_bn = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(self, num_classes: int, widen: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16 * widen, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16 * widen)
        self.conv2 = nn.Conv2d(16 * widen, 32 * widen, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32 * widen)
        self.conv3 = nn.Conv2d(32 * widen, 64 * widen, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64 * widen)
        self.linear = Classifier(64 * widen, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))  # (B, 16 * widen, 16, 16)
        out = relu(self.bn2(self.conv2(out)))  # (B, 32 * widen, 8, 8)
        out = relu(self.bn3(self.conv3(out)))  # (B, 64 * widen, 4, 4)
        return self.linear(out.mean((2, 3)))  # (B, C)


NAMES = "resnet18, resnet18-lbgat, preactresnet18, cnn, cnn-<widen> as cnn-2, wrn<depth>-<widen> as wrn34-10"


def build_model(name: str, num_classes: int) -> nn.Module:
    """The network called `name`, one of NAMES, freshly initialised from torch's global random state, in train mode:
    images (B, 3, 32, 32) in [0, 1] to logits (B, num_classes). Raises ValueError for any other name."""
    if name == "resnet18":
        return ResNet18(num_classes)
    if name == "resnet18-lbgat":
        return ResNet18(num_classes, strides=(1, 1, 2, 2))
    if name == "preactresnet18":
        return PreActResNet18(num_classes)
    if wide := re.fullmatch(r"cnn(?:-([1-9]\d{0,2}))?", name):
        return CNN(num_classes, int(wide[1] or 1))
    wide = re.fullmatch(r"wrn(\d{1,4})-(\d{1,3})", name)
    if wide is None:
        raise ValueError(f"unknown network '{name}': choose from {NAMES}")
    depth, widen = int(wide[1]), int(wide[2])
    if depth < 10 or (depth - 4) % 6 != 0 or widen < 1:
        raise ValueError(f"'{name}' is no wide ResNet: the depth is 10, 16, 22, 28, 34 ..., the width at least 1")
    return WideResNet(num_classes, depth, widen)
