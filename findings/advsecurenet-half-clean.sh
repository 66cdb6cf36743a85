#!/usr/bin/env bash
# advsecurenet 0.2.3: AdversarialTraining trains on each batch's clean and adversarial images together, mixed in one
# batch of twice the size, as Goodfellow et al. (2015), whom it cites; no setting leaves the clean ones out, as Madry et
# al. (2018) do. A scheduler is stepped per batch.
# Seen: batch size 16: 8 updates on 32 images each, 16 of them clean;
#       rate 0.00390625 after 2 epochs of ExponentialLR(gamma=0.5)
# Exits with another status than 0 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# The package imports pkg_resources and writes a log into the current folder.
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 "setuptools<81" advsecurenet==0.2.3
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from advsecurenet.attacks.gradient_based.pgd import PGD
from advsecurenet.defenses.adversarial_training import AdversarialTraining
from advsecurenet.models.base_model import BaseModel
from advsecurenet.shared.types.configs.attack_configs import PgdAttackConfig
from advsecurenet.shared.types.configs.defense_configs.adversarial_training_config import AdversarialTrainingConfig
from torch import nn


class Network(BaseModel):
    def load_model(self):
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 10))

    def models(self):
        return []


torch.manual_seed(0)
x = torch.rand(64, 3, 16, 16)
y = torch.randint(10, (64,))
network = Network()
optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
trained_on = []
network.register_forward_pre_hook(lambda module, inputs: trained_on.append(inputs[0]) if module.training else None)
trainer = AdversarialTraining(
    AdversarialTrainingConfig(
        model=network,
        models=[network],
        attacks=[PGD(PgdAttackConfig(epsilon=8 / 255, alpha=2 / 255, num_iter=2))],
        train_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16),
        epochs=2,
        optimizer=optimizer,
        scheduler="exponential_lr",
        scheduler_kwargs={"gamma": 0.5},
    )
)
trainer.train()
clean = {image.numpy().tobytes() for image in x}
batches = [[image.numpy().tobytes() in clean for image in batch] for batch in trained_on]
assert all((len(batch), sum(batch)) == (32, 16) for batch in batches)
seen = f"batch size 16: {len(batches)} updates on {len(batches[0])} images each, {sum(batches[0])} of them clean; "
seen += f"rate {optimizer.param_groups[0]['lr']} after 2 epochs of ExponentialLR(gamma=0.5)"
print(seen)
assert seen == (
    "batch size 16: 8 updates on 32 images each, 16 of them clean; "
    "rate 0.00390625 after 2 epochs of ExponentialLR(gamma=0.5)"
)
PYTHON
