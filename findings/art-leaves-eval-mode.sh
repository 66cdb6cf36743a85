#!/usr/bin/env bash
# adversarial-robustness-toolbox (ART) 1.20.1: an attack on a PyTorchClassifier leaves the network in eval mode. Whoever
# calls train() once and then attacks in a loop of their own trains in eval mode from the first batch on.
# Seen: train mode after the attack: False; BatchNorm saw 0 of 3 batches
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# ART imports packaging and does not require it.
"$folder/venv/bin/pip" install --quiet torch==2.14.1 adversarial-robustness-toolbox==1.20.1 packaging
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import nn

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 10))
x = torch.rand(16, 3, 16, 16)
y = torch.randint(10, (16,))
classifier = PyTorchClassifier(network, nn.CrossEntropyLoss(), (3, 16, 16), 10, clip_values=(0, 1))
attack = ProjectedGradientDescent(classifier, eps=8 / 255, eps_step=2 / 255, max_iter=2, verbose=False)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

network.train()
for _ in range(3):
    x_adv = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(x_adv), y).backward()
    optimizer.step()
seen = f"train mode after the attack: {network.training}; BatchNorm saw {network[1].num_batches_tracked} of 3 batches"
print(seen)
assert seen == "train mode after the attack: False; BatchNorm saw 0 of 3 batches"
PYTHON
