"""What several tests share: the golden values of the authors' releases, the tiny net they were recorded on."""

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from settings import ATTACK, parse, resolve
from train_dynat import METHODS

GOLDEN = Path(os.environ.get("DYNAT_GOLDEN", Path(__file__).parent / "golden"))


class TinyNet(nn.Module):
    """The network of the golden values: two convolutions with BatchNorm, the mean over H and W, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


def golden_files():
    """Every release_*.pt, so that the tests can be parametrised by file. At least one is there."""
    files = sorted(GOLDEN.glob("release_*.pt"))
    assert files, f"no release_*.pt in {GOLDEN}"
    return files


golden_cases = functools.cache(functools.partial(torch.load, weights_only=True))  # of a file, by name


def tiny_net(state):
    """A TinyNet in float64 and train mode with the given state_dict."""
    net = TinyNet().double()
    net.load_state_dict(state)
    return net


def joint_sgd(hp, *networks):
    """One SGD over all the networks' weights, as the releases make it."""
    weights = [weight for network in networks for weight in network.parameters()]
    return torch.optim.SGD(weights, lr=hp["lr"], momentum=hp["momentum"], weight_decay=hp["weight_decay"])


def settings_of(argv):
    """The settings of a new run with these flags."""
    typed, _, flags = parse(argv.split(), METHODS)
    return resolve(typed, METHODS, flags)


def step_arguments(method, **settings):
    """The keyword arguments of a method's step: its published settings where `settings` say nothing else."""
    published = {**ATTACK, **METHODS[method]["step_settings"], "noise": lambda k: torch.zeros(()), "all_reduce": None}
    names = (*ATTACK, *METHODS[method]["step_settings"], *METHODS[method].get("needs", ()))
    return {name: {**published, **settings}[name] for name in names}


def assert_close(actual, expected, tolerance, what):
    difference = (actual.detach().double() - expected.double()).abs().max().item()
    assert difference <= tolerance, f"{what} differs by {difference:.3g}"


def assert_state(network, expected, tolerance, what, buffers=True):
    """Weights, and BatchNorm buffers unless told otherwise, agree with a state_dict to the tolerance."""
    state = network.state_dict()
    assert state.keys() == expected.keys()
    for name in state if buffers else dict(network.named_parameters()):
        assert_close(state[name], expected[name], tolerance, f"{what} {name}")


def counted_accuracy(model, images):
    """The share of images that the network in eval mode classifies as their label, in one forward."""
    with torch.no_grad():
        return (model.eval()(images.x / 255).argmax(1) == images.y).double().mean().item()
