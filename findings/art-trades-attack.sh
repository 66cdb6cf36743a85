#!/usr/bin/env bash
# adversarial-robustness-toolbox (ART) 1.20.1: AdversarialTrainerTRADES trains on the images of the attack that it is
# given, and passes it the labels. ART's PGD maximises the classifier's own loss, so the inner attack is cross-entropy
# on the labels; TRADES' is KL between the clean and the attacked prediction (Zhang et al., 2019). An update makes two
# forwards in train mode; TRADES' code makes three, of which two are of the clean images, so BatchNorm's mean differs.
# Seen: pixels as from cross-entropy 100%, as from KL 29%; forwards in train mode 2
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# ART imports packaging and does not require it.
"$folder/venv/bin/pip" install --quiet torch==2.14.1 adversarial-robustness-toolbox==1.20.1 packaging
"$folder/venv/bin/python" - <<'PYTHON'
from copy import deepcopy

import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.defences.trainer import AdversarialTrainerTRADESPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import nn
from torch.nn.functional import cross_entropy, kl_div


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8 * 7 * 7, 10)

    def forward(self, x):
        return self.linear(self.bn(self.conv(x)).relu().flatten(1))


torch.manual_seed(0)
np.random.seed(0)
network = Network()
before = deepcopy(network).eval()
x = torch.rand(32, 3, 16, 16)
y = before(x).argmax(1)

optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
classifier = PyTorchClassifier(network, nn.CrossEntropyLoss(), (3, 16, 16), 10, optimizer, clip_values=(0, 1))
attack = ProjectedGradientDescent(classifier, eps=0.1, eps_step=0.02, max_iter=10, verbose=False)
trained_on = []
network.register_forward_pre_hook(lambda module, inputs: trained_on.append(inputs[0]) if module.training else None)
AdversarialTrainerTRADESPyTorch(classifier, attack, beta=6.0).fit(x.numpy(), y.numpy(), batch_size=32, nb_epochs=1)
clean, x_adv = trained_on[:2]


def pgd(start, loss):
    x = start
    for _ in range(10):
        x = x.detach().requires_grad_(True)
        step = 0.02 * torch.autograd.grad(loss(before(x)), x)[0].sign()
        x = torch.min(torch.max(x + step, clean - 0.1), clean + 0.1).clamp(0, 1)
    return x.detach()


def share(other):
    return ((x_adv - other).abs() < 1e-5).float().mean()


probabilities = before(clean).softmax(1).detach()
by_labels = pgd(clean, lambda logits: cross_entropy(logits, probabilities.argmax(1)))
kl = lambda logits: kl_div(logits.log_softmax(1), probabilities, reduction="sum")
by_kl = pgd(clean + 0.001 * torch.randn_like(clean), kl)
print(f"pixels as from cross-entropy {share(by_labels):.0%}, as from KL {share(by_kl):.0%};", end=" ")
print(f"forwards in train mode {len(trained_on)}")
assert share(by_labels) > 0.99 and share(by_kl) < 0.5 and len(trained_on) == 2
PYTHON
