#!/usr/bin/env bash
# deeprobust 0.2.11: PGDtraining updates with the sum of K + 1 gradients, K the steps of its PGD. The attack's backwards
# add their weight gradients to those of the loss, because zero_grad() comes before the attack. Madry et al. (2018)
# update with the gradient of the loss on the adversarial images alone. Two lines below make it run here: its PGD asks
# for CUDA, and its C&W imports a name that SciPy has moved.
# Seen: relative difference of the update's gradient from that of the adversarial images 9.7,
#       from the sum over 11 forwards 0.0
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 deeprobust==0.2.11
"$folder/venv/bin/python" - <<'PYTHON'
from copy import deepcopy
from functools import partial

import numpy as np
import scipy.optimize
import torch

scipy.optimize.optimize._status_message = scipy.optimize._optimize._status_message
from deeprobust.image.defense import pgdtraining
from torch import nn
from torch.nn.functional import cross_entropy

pgdtraining.PGD = partial(pgdtraining.PGD, device="cpu")
torch.manual_seed(0)
np.random.seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 10))
before = deepcopy(network)
x = torch.rand(16, 3, 16, 16)
y = torch.randint(10, (16,))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def gradient_at(x):
    return flat(torch.autograd.grad(cross_entropy(before(x), y), list(before.parameters())))


inputs = []
network.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
used = []
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
optimizer.register_step_pre_hook(lambda *_: used.append(flat(p.grad for p in network.parameters())))
trainer = pgdtraining.PGDtraining(network, "cpu")
trainer.parse_params(epsilon=8 / 255, num_steps=10, perturb_step_size=2 / 255)
trainer.train("cpu", loader, optimizer, epoch=1)

# The attack's first forward is of the clean images and without a backward.
steps = [gradient_at(x) for x in inputs[1:]]
adversarial, total = ((used[0] - gradient).norm() / gradient.norm() for gradient in (steps[-1], sum(steps)))
print(f"relative difference of the update's gradient from that of the adversarial images {adversarial:.1f},", end=" ")
print(f"from the sum over {len(steps)} forwards {total:.1f}")
assert adversarial > 5 and total < 0.01 and len(steps) == 11
PYTHON
