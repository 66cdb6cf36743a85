#!/usr/bin/env bash
# adversarial-robustness-toolbox (ART) 1.20.1: AdversarialTrainer calls the classifier's fit once per batch, as an epoch
# of its own, and hands a scheduler on to it. PyTorchClassifier.fit steps a scheduler once per epoch, as documented;
# under AdversarialTrainer, and AdversarialTrainerMadryPGD, which calls it, it is stepped once per batch.
# Seen: 2 epochs of 4 batches, adversarial: 8 scheduler steps, rate 0.00390625;
#       the classifier's own fit: 2 scheduler steps, rate 0.25
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
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import PyTorchClassifier
from torch import nn

x = torch.rand(64, 3, 16, 16).numpy()
y = torch.eye(10)[torch.randint(10, (64,))].numpy()


def two_epochs(trainer):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    classifier = PyTorchClassifier(network, nn.CrossEntropyLoss(), (3, 16, 16), 10, optimizer, clip_values=(0, 1))
    trainer(classifier).fit(x, y, batch_size=16, nb_epochs=2, scheduler=scheduler)
    return f"{scheduler.last_epoch} scheduler steps, rate {optimizer.param_groups[0]['lr']}"


def adversarial(classifier):
    attack = ProjectedGradientDescent(classifier, eps=8 / 255, eps_step=2 / 255, max_iter=2, verbose=False)
    return AdversarialTrainer(classifier, attack, ratio=1.0)


seen = f"2 epochs of 4 batches, adversarial: {two_epochs(adversarial)}; "
seen += f"the classifier's own fit: {two_epochs(lambda classifier: classifier)}"
print(seen)
assert seen == (
    "2 epochs of 4 batches, adversarial: 8 scheduler steps, rate 0.00390625; "
    "the classifier's own fit: 2 scheduler steps, rate 0.25"
)
PYTHON
