#!/usr/bin/env bash
# adv-lib 0.2.8: apgd_targeted turns misclassified images into correct ones. It aims at every class but the one that is
# predicted and never reads the labels. Where the prediction is wrong, the label is one of its targets, and reaching a target
# counts as success.
# Seen: 178 of 200 images are wrong before the attack; it makes 23 of them right
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 "setuptools<81" wheel
# visdom, which adv-lib imports, needs a setuptools that still has pkg_resources to be built.
"$folder/venv/bin/pip" install --quiet --no-build-isolation visdom==0.2.4
"$folder/venv/bin/pip" install --quiet adv-lib==0.2.8
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from adv_lib.attacks import apgd_targeted
from torch import nn

torch.manual_seed(0)
network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10)).eval()
x, y = torch.rand(200, 3, 8, 8), torch.randint(0, 10, (200,))
wrong = network(x).argmax(1) != y
x_adv = apgd_targeted(network, x, y, eps=8 / 255, norm=float("inf"))
repaired = int((wrong & (network(x_adv).argmax(1) == y)).sum())
print(f"{int(wrong.sum())} of 200 images are wrong before the attack; it makes {repaired} of them right")
assert repaired > 0
PYTHON
