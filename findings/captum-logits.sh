#!/usr/bin/env bash
# captum 0.9.0: FGSM and PGD without a loss take -log of the network's output ("the default loss function is negative
# log"). Of a negative logit that is not a number, but its gradient is finite and has the wrong sign: the attack raises
# the label's logit.
# Seen: the label's probability without a loss: up for 100, down for 0; with cross-entropy: up for 0, down for 100
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 captum==0.9.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from captum.robust import FGSM
from torch import nn
from torch.nn.functional import cross_entropy

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 10)).eval()
x = torch.rand(100, 3, 16, 16)
y = network(x).argmax(1)


def lower(x):  # the same probabilities
    return network(x) - 10


def summary(loss):
    x_adv = FGSM(lower, loss, lower_bound=0, upper_bound=1).perturb(x, epsilon=8 / 255, target=y)
    before, after = (lower(images).softmax(1).gather(1, y[:, None]) for images in (x, x_adv))
    return f"up for {(after > before).sum()}, down for {(after < before).sum()}"


seen = f"the label's probability without a loss: {summary(None)}; "
seen += f"with cross-entropy: {summary(lambda logits, y: cross_entropy(logits, y, reduction='none'))}"
print(seen)
assert seen == (
    "the label's probability without a loss: up for 100, down for 0; "
    "with cross-entropy: up for 0, down for 100"
)
PYTHON
