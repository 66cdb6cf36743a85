"""What is faster stays the same network: the same weights, modes, updates and decisions. No update waits for a GPU."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from cases import TinyNet, settings_of
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import data
from attacks import linf_pgd
from cli import numerics
from models import build_model
from settings import ATTACK
from speed import FastNetwork, memory_format, tf32, update_ema
from train_dynat import METHODS, main

X = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FOLDED = {"cnn": 3, "resnet18": 20, "preactresnet18": 8, "wrn16-2": 6}  # BatchNorms that alone read a convolution
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -n 0 -k gpu")


@pytest.mark.parametrize("name", FOLDED)
def test_logits_of_a_bf16_network_are_float32_with_more_than_bf16s_digits(name):
    fast = FastNetwork(build_model(name, 10), bf16=True).eval()
    logits, exact = fast(X), fast.model(X)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    assert 0 < (logits - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_network_of_ones_own_has_float32_logits_in_bf16_and_float64_logits_in_float64():
    for training in (True, False):
        assert FastNetwork(TinyNet(), bf16=True).train(training)(X).dtype == torch.float32
        assert FastNetwork(TinyNet().double()).train(training)(X.double()).dtype == torch.float64


@pytest.mark.parametrize("name", FOLDED)
def test_the_attacks_network_equals_the_model_after_each_update_and_gives_it_no_gradients(name):
    fast, x = FastNetwork(build_model(name, 10).double()), X[:2, :, ::2, ::2].double()
    for _ in range(2):
        for value in fast.state_dict().values():
            value.uniform_(0.5, 1.5) if value.dim() == 1 else value.mul_(2)  # BatchNorm's are vectors
        for training in (True, False):
            logits = fast.train(training)(x.clone().requires_grad_())
            torch.testing.assert_close(logits, copy.deepcopy(fast.model)(x), rtol=1e-9, atol=1e-9)
            logits.sum().backward()
    assert all(weight.grad is None for weight in fast.parameters())
    assert str(fast.model).count("BatchNorm2d") - str(fast.networks["eval"]).count("BatchNorm2d") == FOLDED[name]


def update(method, wrap, x, count=2):
    """Updates of new networks, with EMA, on the images x. Returns x_adv and all values of all state_dicts."""
    method, settings = METHODS[method], settings_of(f"--method {method}")
    chosen = {name: settings[name] for name in (*ATTACK, *method["step_settings"])} | {"steps": 2}
    chosen |= {"x": x, "y": torch.arange(len(x), device=x.device), "start": x + 0.001}
    from_loop = {"epoch": 100, "noise": lambda k: 0.01 * k * x, "all_reduce": None}
    chosen |= {name: from_loop[name] for name in method.get("needs", ())}
    torch.manual_seed(0)
    networks = {role: build_model("cnn", 10).to(x) for role in ("target", "guide") if role in settings}
    optimizer = torch.optim.SGD([weight for net in networks.values() for weight in net.parameters()], lr=0.1)
    fast, ema = {role: wrap(network) for role, network in networks.items()}, copy.deepcopy(networks["target"])
    for _ in range(count):
        x_adv, _ = method["step"](**fast, optimizer=optimizer, **chosen)
        update_ema(ema, networks["target"], 0.9)
    return [x_adv, *(value for net in (*networks.values(), ema) for value in net.state_dict().values())]


@pytest.mark.parametrize("method", METHODS)
def test_every_step_makes_the_same_update_through_a_fast_network(method):
    updates = update(method, FastNetwork, X.double()), update(method, lambda net: net, X.double())
    for fast, exact in zip(*updates, strict=True):
        torch.testing.assert_close(fast, exact, rtol=1e-9, atol=1e-9)


class OneDevice(TorchDispatchMode):
    """Fails where the host reads from the meta device, which stands for a GPU, or a tensor moves between the two."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        assert all(tensor.is_meta for tensor in tensors) and "_local_scalar_dense" not in str(function), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_an_update_with_ema_neither_reads_from_the_device_nor_copies_to_it(method, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none on the meta device
    with torch.device("meta"), OneDevice():
        update(method, FastNetwork, torch.rand(8, 3, 32, 32), count=1)


def test_ema_equals_torchs_averaged_model_and_at_first_the_model_itself():
    model = build_model("cnn", 10)
    ema = copy.deepcopy(model)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for decay in (0.0, 0.9, 0.9):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.add_(torch.rand(tensor.shape).mul(9).to(tensor.dtype))
        averaged.update_parameters(model)
        update_ema(ema, model, decay)
        expected, own = averaged.module.state_dict(), model.state_dict()
        for name, value in ema.state_dict().items():
            assert torch.equal(value, own[name] if decay == 0 or "num_batches" in name else expected[name])


def test_tf32_is_on_inside_alone_and_for_convolutions_alone():
    with numerics(deterministic=True):
        with tf32(True):
            assert torch.backends.cudnn.conv.fp32_precision == "tf32"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.get_float32_matmul_precision() == "highest"  # torch.compile reads it; raises for mixed flags
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"


def test_networks_and_images_are_channels_last_except_in_float32_on_a_gpu():
    assert memory_format(torch.device("cuda"), "fp32") == torch.contiguous_format
    for device, precision in (("cpu", "fp32"), ("cpu", "bf16"), ("cuda", "tf32"), ("cuda", "bf16")):
        assert memory_format(torch.device(device), precision) == torch.channels_last


@pytest.fixture
def compilations(monkeypatch):
    """(images, inputs that require a gradient) of each compilation. It is torch.compile but for the machine code."""
    compile_it, seen = torch.compile, []

    def backend(graph, inputs):
        (images,) = (value for value in inputs if value.shape[1:] == (3, 32, 32))
        seen.append((len(images), sum(value.requires_grad for value in inputs)))
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda network, **options: compile_it(network, **options, backend=backend))
    torch._dynamo.reset()
    return seen


def run(out, *words, size=100):
    """The losses of a run of two epochs, by default of two batches of 20 images each and a last one of 10."""
    argv = ["--dataset", "tiny", "--train-images", "50", "--batch-size", "20", "--epochs", "2", "--steps", "2", *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TINY_SIZE", {"train": size, "test": 20})
        assert main([*argv, "--out", str(out)]) == 0
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("method", "attack"), [("dynat", [(20, 0), (20, 1)]), ("pgd-at", [(20, 1)])])
def test_a_compiled_run_compiles_each_use_once_and_follows_the_exact_run(tmp_path, compilations, method, attack):
    compiled = run(tmp_path / "compiled", "--method", method, "--compile")
    assert sorted(compilations) == [*attack, (20, 11), (20, 11)]  # in an update all weights, under attack none
    assert compiled == pytest.approx(run(tmp_path / "exact", "--method", method), rel=1e-3)


def test_an_attack_is_captured_for_the_first_shape_alone_and_its_logits_are_kept(compilations, monkeypatch):
    captured, replayed = [], []

    def replay(images):  # as a CUDA graph does, it overwrites the logits that it gave before
        for logits in replayed:
            logits.data.zero_()
        replayed.append(captured[0](images))
        return replayed[-1]

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda call, sample: captured.append(call) or replay)
    fast = FastNetwork(build_model("cnn", 10), compiled=True).eval()
    fast.capture = True
    for x in (X, X[:3], X):
        logits = fast(x.clone().requires_grad_())
        fast(x.flip(3).requires_grad_())
        torch.testing.assert_close(logits, fast.model(x))
    assert len(captured) == 1 and len(replayed) == 4 and compilations == [(8, 1)]


@needs_gpu
def test_on_a_gpu_a_compiled_and_captured_attack_agrees_with_the_exact_one():
    model, y = build_model("resnet18", 10).cuda(), torch.arange(8, device="cuda")
    fast = FastNetwork(model, compiled=True).eval()
    with numerics(deterministic=True):
        for x in (X.cuda(), X.cuda(), X[:5].cuda()):
            x.requires_grad_()
            exact, other = (torch.autograd.grad(F.cross_entropy(f(x), y[: len(x)]), x)[0] for f in (model, fast))
            torch.testing.assert_close(other, exact, rtol=0, atol=0.001 * exact.abs().max().item())


@needs_gpu
@pytest.mark.parametrize("words", [[], ["--precision", "tf32"], ["--precision", "bf16", "--compile"]])
def test_on_a_gpu_the_same_seed_gives_the_same_losses_near_the_exact_ones(tmp_path, words):
    first, second = (run(tmp_path / name, "--device", "cuda", "--ema", "0.9", *words) for name in "ab")
    assert first == second == pytest.approx(run(tmp_path / "exact", "--device", "cuda"), rel=0.05)


def test_losses_in_bf16_follow_the_exact_ones(tmp_path):
    exact, bf16 = run(tmp_path / "fp32"), run(tmp_path / "bf16", "--precision", "bf16")
    assert bf16 != exact and bf16 == pytest.approx(exact, rel=0.02)


def test_the_bf16_attack_reaches_the_accuracy_of_the_float32_attack(tmp_path):
    run(tmp_path / "a", "--method", "pgd-at", "--steps", "1", "--train-images", "700", "--batch-size", "32", size=700)
    model, images, accuracies = build_model("cnn", 10).eval(), data.load_images("tiny", "train"), []
    model.load_state_dict(torch.load(tmp_path / "a" / "weights.pt", weights_only=True))
    x, y = data.to_float(images.x[:300]), images.y[:300]
    for network in (model, FastNetwork(model, bf16=True).eval()):
        objective = lambda logits: F.cross_entropy(logits, y, reduction="sum")
        x_adv = linf_pgd(network, x, x, objective, epsilon=6 / 255, step_size=1 / 255, steps=10)
        accuracies.append((model(x_adv).argmax(1) == y).double().mean().item())
    assert 0.3 < accuracies[0] < 0.7 and accuracies[1] == pytest.approx(accuracies[0], abs=0.007)


@pytest.mark.parametrize("wrong", ["the activation first", "a bias"])
def test_a_wrong_conv_bn_is_refused_when_the_network_is_built(wrong):
    class Wrong(TinyNet):
        conv_bn = (("conv1", "bn1"),)

        def forward(self, x):
            hidden = self.bn1(F.relu(self.conv1(x))) if wrong == "the activation first" else self.bn1(self.conv1(x))
            return self.linear(F.relu(self.bn2(self.conv2(hidden))).mean((2, 3)))

    network = Wrong()
    if wrong == "a bias":
        network.conv1 = nn.Conv2d(3, 8, 3, padding=1)
    with pytest.raises(ValueError, match="conv_bn of Wrong names a BatchNorm that cannot be folded"):
        FastNetwork(network)
