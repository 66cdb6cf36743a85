#!/usr/bin/env bash
# adv-lib 0.2.8: apgd_targeted does not read its labels. It attacks every class but the predicted one, so it turns
# misclassified images into their own class, and they count as right after the attack.
# Seen: right of 100: 0 before, 100 after apgd_targeted, 0 after apgd; the same images from other labels: True
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# visdom, which adv-lib imports, builds with an older setuptools only.
"$folder/venv/bin/pip" install --quiet "setuptools<81" wheel
"$folder/venv/bin/pip" install --quiet --no-build-isolation visdom==0.2.4
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 adv-lib==0.2.8
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from adv_lib.attacks import apgd, apgd_targeted
from torch import nn

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 10)).eval()
x = torch.rand(100, 3, 16, 16)
# The second most likely class as label: every image is misclassified before an attack.
y = network(x).topk(2).indices[:, 1]


def right(attack, labels):
    torch.manual_seed(0)
    x_adv = attack(network, x, labels, eps=8 / 255, norm=float("inf"))
    return x_adv, (network(x_adv).argmax(1) == y).sum()


x_adv, repaired = right(apgd_targeted, y)
same = torch.equal(x_adv, right(apgd_targeted, (y + 1) % 10)[0])
seen = f"right of 100: 0 before, {repaired} after apgd_targeted, {right(apgd, y)[1]} after apgd; "
seen += f"the same images from other labels: {same}"
print(seen)
assert seen == (
    "right of 100: 0 before, 100 after apgd_targeted, 0 after apgd; "
    "the same images from other labels: True"
)
PYTHON
