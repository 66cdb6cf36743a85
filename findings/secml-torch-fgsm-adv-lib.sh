#!/usr/bin/env bash
# secml-torch 1.5: FGSM with the backend "advlib" returns the clean images. It calls adv-lib 0.2.8's pgd_linf with one step,
# which judges the images before each step alone, so what its only step finds is never returned. The backend "foolbox"
# moves every image.
# Seen: foolbox moved 64 of 64 images, 6 stay correct
#       advlib moved 0 of 64 images, 64 stay correct
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 "setuptools<81" wheel
# visdom, which adv-lib imports, needs a setuptools that still has pkg_resources to be built.
"$folder/venv/bin/pip" install --quiet --no-build-isolation visdom==0.2.4
"$folder/venv/bin/pip" install --quiet secml-torch==1.5 foolbox==3.3.4 adv-lib==0.2.8
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from secmlt.adv.evasion.fgsm import FGSM
from secmlt.models.pytorch.base_pytorch_nn import BasePyTorchClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10)).eval()
x = torch.rand(64, 3, 8, 8)
y = network(x).argmax(1)
moved = {}
for backend in ("foolbox", "advlib"):
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    [(x_adv, _)] = FGSM("linf", 8 / 255, backend=backend)(BasePyTorchClassifier(network), loader)
    moved[backend] = int((x_adv != x).flatten(1).any(1).sum())
    stay = int((network(x_adv).argmax(1) == y).sum())
    print(f"{backend} moved {moved[backend]} of 64 images, {stay} stay correct")
assert moved == {"foolbox": 64, "advlib": 0}
PYTHON
