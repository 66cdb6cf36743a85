#!/usr/bin/env bash
# torchattacks 3.5.1 and rai-toolbox 0.2.1: an attack on a network in train mode whose BatchNorm is frozen by eval()
# leaves that BatchNorm in train mode. Both put the network into eval mode and afterwards call train() on all of it.
# rai-toolbox's `evaluating` promises to restore a module's state faithfully.
# Seen: train mode after the attack: torchattacks: network True, BatchNorm True;
#       rai-toolbox: network True, BatchNorm True
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 torchattacks==3.5.1 rai-toolbox==0.2.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torchattacks
from rai_toolbox.optim import LinfProjectedOptim
from rai_toolbox.perturbations import gradient_ascent
from torch import nn

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 10))
x = torch.rand(16, 3, 16, 16)
y = torch.randint(10, (16,))
pgd = torchattacks.PGD(network, eps=8 / 255, alpha=2 / 255, steps=2)
budget = {"epsilon": 8 / 255, "lr": 2 / 255, "steps": 2}
attacks = {
    "torchattacks": lambda: pgd(x, y),
    "rai-toolbox": lambda: gradient_ascent(model=network, data=x, target=y, optimizer=LinfProjectedOptim, **budget),
}
seen = []
for name, attack in attacks.items():
    network.train()
    network[1].eval()
    attack()
    seen.append(f"{name}: network {network.training}, BatchNorm {network[1].training}")
seen = "train mode after the attack: " + "; ".join(seen)
print(seen)
assert seen == (
    "train mode after the attack: torchattacks: network True, BatchNorm True; "
    "rai-toolbox: network True, BatchNorm True"
)
PYTHON
