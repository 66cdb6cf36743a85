#!/usr/bin/env bash
# adversarial-robustness-toolbox (ART) 1.20.1: AdversarialTrainerFBF trains in eval mode. The gradient of its attack
# puts the network into eval mode and nothing puts it back before the update: BatchNorm uses its running statistics,
# which stay as they were, and dropout drops nothing. Fast adversarial training (Wong et al., 2020) trains in train
# mode.
# Seen: 8 updates, 16 forwards, 0 of them in train mode; BatchNorm saw 0 batches
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# ART imports packaging and does not require it.
"$folder/venv/bin/pip" install --quiet torch==2.14.1 adversarial-robustness-toolbox==1.20.1 packaging
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from art.defences.trainer import AdversarialTrainerFBFPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8 * 7 * 7, 10)

    def forward(self, x):
        return self.linear(self.bn(self.conv(x)).relu().flatten(1))


torch.manual_seed(0)
network = Network()
x = torch.rand(64, 3, 16, 16).numpy()
y = torch.eye(10)[torch.randint(10, (64,))].numpy()
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
classifier = PyTorchClassifier(network, nn.CrossEntropyLoss(), (3, 16, 16), 10, optimizer, clip_values=(0, 1))

network.train()
modes = []
network.register_forward_hook(lambda module, *_: modes.append(module.training))
updates = []
optimizer.register_step_post_hook(lambda *_: updates.append(1))
AdversarialTrainerFBFPyTorch(classifier, eps=8 / 255).fit(x, y, batch_size=16, nb_epochs=2)
seen = f"{len(updates)} updates, {len(modes)} forwards, {sum(modes)} of them in train mode; "
seen += f"BatchNorm saw {network.bn.num_batches_tracked} batches"
print(seen)
assert seen == "8 updates, 16 forwards, 0 of them in train mode; BatchNorm saw 0 batches"
PYTHON
