#!/usr/bin/env bash
# secml-torch 1.5: FGSM with the backend "advlib" returns the clean images. It is adv-lib's pgd_linf with one step, and
# that judges images before a step and never after the last.
# Seen: advlib: changes 0 of 100 images; foolbox: changes 100 of 100 images
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# visdom, which adv-lib imports, builds with an older setuptools only.
"$folder/venv/bin/pip" install --quiet "setuptools<81" wheel
"$folder/venv/bin/pip" install --quiet --no-build-isolation visdom==0.2.4
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 secml-torch==1.5 adv-lib==0.2.8 foolbox==3.3.4
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from secmlt.adv.evasion.fgsm import FGSM
from secmlt.models.pytorch.base_pytorch_nn import BasePyTorchClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 10)).eval()
x = torch.rand(100, 3, 16, 16)
y = network(x).argmax(1)
loader = DataLoader(TensorDataset(x, y), batch_size=100)
seen = []
for backend in ("advlib", "foolbox"):
    attack = FGSM("linf", epsilon=8 / 255, backend=backend)
    ((x_adv, _),) = attack(BasePyTorchClassifier(network), loader)
    seen.append(f"{backend}: changes {(x_adv != x).flatten(1).any(1).sum()} of 100 images")
seen = "; ".join(seen)
print(seen)
assert seen == "advlib: changes 0 of 100 images; foolbox: changes 100 of 100 images"
PYTHON
