#!/usr/bin/env bash
# torchattacks 3.5.1: AutoAttack's version "standard" makes 10 steps of APGD, targeted APGD and FAB. Standard AutoAttack
# makes 100 of each (Croce and Hein, 2020), and the class has no argument for it. Square has its 5,000 queries.
# Seen: APGD 10 steps, 12 forwards; APGDT 10 steps; FAB 10 steps; Square 5000 queries
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 torchattacks==3.5.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torchattacks import AutoAttack

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 10)).eval()
x = torch.rand(8, 3, 16, 16)
y = network(x).argmax(1)
# With an epsilon that fools no image, APGD makes all its steps.
apgd, apgdt, fab, square = AutoAttack(network, eps=1e-4, seed=0)._autoattack.attacks
forwards = []
network.register_forward_hook(lambda *_: forwards.append(1))
apgd(x, y)
seen = f"APGD {apgd.steps} steps, {len(forwards)} forwards; APGDT {apgdt.steps} steps; FAB {fab.steps} steps; "
seen += f"Square {square.n_queries} queries"
print(seen)
assert seen == "APGD 10 steps, 12 forwards; APGDT 10 steps; FAB 10 steps; Square 5000 queries"
PYTHON
