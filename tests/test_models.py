"""The networks agree with the releases': keys, shapes, parameter counts and logits (tests/golden/architectures.pt)."""

import functools
import zlib

import pytest
import torch
from cases import GOLDEN, assert_close

from checkpoints import find_weights, load_weights
from models import build_model

pytestmark = pytest.mark.usefixtures("float64")

NAMES = {
    "resnet18": "resnet18",
    "resnet18_lbgat": "resnet18-lbgat",
    "resnet18_lbgat_c100": "resnet18-lbgat",
    "preactresnet18": "preactresnet18",
    "wrn34_10": "wrn34-10",
    "wrn34_10_subblock": "wrn34-10",
}
ARCHITECTURES = torch.load(GOLDEN / "architectures.pt", weights_only=True)


def uniform(key, count):
    """The golden file's closed-form numbers in [0, 1): a 32-bit hash of the key's checksum plus the index."""
    u32 = 0xFFFFFFFF
    v = (torch.arange(count, dtype=torch.int64) + zlib.crc32(key.encode())) & u32
    for multiplier, shift in ((2654435761, 15), (2246822519, 13), (3266489917, 16)):
        low, high = multiplier & 0xFFFF, multiplier >> 16  # in two halves, so that 64 bits do not overflow
        v = (v * low + ((v * high & 0xFFFF) << 16)) & u32
        v = v ^ (v >> shift)
    return v.double() / 2**32


@functools.cache  # both wide networks share their 46 million numbers
def filled(key, shape):
    """The value that the golden file's recipe gives to one entry of a state_dict."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    u = uniform(key, shape.numel()).view(shape)
    if len(shape) >= 2:
        return (u - 0.5) * (24 / shape[1:].numel()) ** 0.5
    return 0.5 + u if key.endswith((".weight", "running_var")) else 0.2 * (u - 0.5)


def shapes(case):
    sizes = [torch.Size(int(n) for n in line.split(",") if n) for line in case["shapes"].split("\n")]
    return dict(zip(case["keys"].split("\n"), sizes, strict=True))


def filled_state(case):
    """The recipe's state_dict; what is dropped on load may hold anything."""
    return {
        key: torch.zeros(shape) if key.startswith("sub_block1.") else filled(key, shape)
        for key, shape in shapes(case).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_releases_network(name):
    """So do the keys, in their order, the shapes and the number of weights; `sub_block1` counts as dropped on load."""
    case, x = ARCHITECTURES[name], ARCHITECTURES[name]["x"]
    model = build_model(NAMES[name], num_classes=100 if name.endswith("c100") else 10).double()
    live = {key: shape for key, shape in shapes(case).items() if not key.startswith("sub_block1.")}
    assert [(key, value.shape) for key, value in model.state_dict().items()] == [*live.items()]
    dead = {key: shape.numel() for key, shape in shapes(case).items() if key not in live}
    assert len(dead) == (61 if name == "wrn34_10_subblock" else 0)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    dead_weights = sum(count for key, count in dead.items() if not key.endswith(buffers))
    assert sum(weight.numel() for weight in model.parameters()) + dead_weights == case["n_params"]
    state_dict, _, _ = find_weights(filled_state(case), model.state_dict(), "the recipe")
    load_weights(model, state_dict)
    assert_close(x.flatten(), uniform("input", x.numel()), 1e-12, "the recipe")
    with torch.no_grad():
        assert_close(model.eval()(x), case["logits_eval"], 1e-9, "logits in eval mode")
        assert_close(model.train()(x), case["logits_train"], 1e-9, "logits in train mode")


@pytest.mark.parametrize("name", ["resnet18", "resnet18-lbgat", "preactresnet18", "cnn", "wrn10-1", "wrn16-2"])
def test_every_network_gives_one_row_of_logits_per_image(name):
    for num_classes in (2, 100):
        assert build_model(name, num_classes)(torch.rand(2, 3, 32, 32)).shape == (2, num_classes)


@pytest.mark.parametrize("name", ["resnet", "wrn34", "wrn35-10", "wrn34-0", "wrn4-1", "WRN34-10", "wrn34-10x", ""])
def test_an_unknown_network_is_named_in_the_error(name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        build_model(name, 10)


def test_wide_resnet_is_initialised_as_the_release_does():
    torch.manual_seed(0)
    model = build_model("wrn10-2", 10)
    conv = model.block3.layer[0].conv2.weight  # (128, 128, 3, 3)
    assert conv.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert model.fc.bias.abs().max() == 0
