#!/usr/bin/env bash
# An attack changes the modes of a network in train mode whose BatchNorm is frozen, that is, in eval mode, as in fine-tuning:
#   torchattacks 3.5.1 and rai-toolbox 0.2.1 leave all of it in train mode: the frozen statistics move from then on
#   adversarial-robustness-toolbox 1.20.1 leaves all of it in eval mode: nothing after the attack trains BatchNorm
# Seen: torchattacks: network in train mode True, its BatchNorm True
#       rai_toolbox: network in train mode True, its BatchNorm True
#       art: network in train mode False, its BatchNorm False
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 torchattacks==3.5.1 rai-toolbox==0.2.1 \
    adversarial-robustness-toolbox==1.20.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from rai_toolbox.optim import LinfProjectedOptim
from rai_toolbox.perturbations import gradient_ascent
from torch import nn
from torchattacks import PGD

x, y = torch.rand(4, 3, 8, 8), torch.arange(4)


def torchattacks(network):
    PGD(network)(x, y)


def rai_toolbox(network):
    gradient_ascent(model=network, data=x, target=y, optimizer=LinfProjectedOptim, steps=1, lr=0.01, epsilon=0.03)


def art(network):
    classifier = PyTorchClassifier(network, nn.CrossEntropyLoss(), (3, 8, 8), 10, clip_values=(0, 1))
    ProjectedGradientDescent(classifier, eps=0.03, max_iter=2, verbose=False).generate(x.numpy(), y.numpy())


modes = {}
for attack in (torchattacks, rai_toolbox, art):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10))
    network.train()[1].eval()
    attack(network)
    modes[attack.__name__] = network.training, network[1].training
    print(f"{attack.__name__}: network in train mode {network.training}, its BatchNorm {network[1].training}")
assert modes == {"torchattacks": (True, True), "rai_toolbox": (True, True), "art": (False, False)}
PYTHON
