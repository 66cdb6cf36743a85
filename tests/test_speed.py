"""What is faster stays the same network: the same weights, modes and decisions."""

import copy
import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import mutant_module

import data
import models
import speed
import train_dynat
from attacks import eval_mode, linf_pgd
from models import build_model
from speed import Fast
from train_dynat import METHODS, main

BUDGET = {"epsilon": 8 / 255, "step_size": 2 / 255}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("cnn", 10)


@pytest.fixture
def x():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile as it is but for the machine code: what it traces, and when anew, does not depend on that."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()


def test_a_fast_network_has_the_models_parameters_buffers_and_modes(model):
    fast = Fast(model, bf16=True, compiled=False)
    for mine, own in ((fast.parameters(), model.parameters()), (fast.buffers(), model.buffers())):
        assert all(a is b for a, b in zip(mine, own, strict=True))
    with eval_mode(fast):
        assert not model.training and not model.bn1.training
    assert model.training and model.bn1.training


@pytest.mark.parametrize("name", ["cnn", "resnet18", "preactresnet18", "wrn10-1"])
def test_logits_of_a_bf16_network_are_float32_with_more_than_bf16s_digits(x, name):
    model = build_model(name, 10)
    fast = Fast(model, bf16=True, compiled=False)
    with eval_mode(fast), torch.no_grad():
        logits, exact = fast(x), model(x)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    assert 0 < (logits - exact).abs().max() < 0.05 * exact.abs().max()


def randomise(model):
    """BatchNorms whose statistics and weights are not those of a new network."""
    draws = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draws))


def check_follows(module, name, x):
    """Without gradients of the weights, and with BatchNorm in the convolutions, it is the model; after updates too."""
    model = build_model(name, 10).double()
    randomise(model)
    fast, x = module.Fast(model), x[:2].double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(fast(x), torch.tensor([1, 2])).backward()
        optimizer.step()
        for mode in (eval_mode, nullcontext):
            with mode(fast):
                attacked = x.clone().requires_grad_()
                logits, exact = fast(attacked), copy.deepcopy(model)(x)
                torch.testing.assert_close(logits, exact, rtol=1e-9, atol=1e-9)
                former = [weight.grad.clone() for weight in model.parameters()]
                logits.sum().backward()
        assert all(torch.equal(weight.grad, grad) for weight, grad in zip(model.parameters(), former, strict=True))
    assert not any(weight.requires_grad for use in ("train", "eval") for weight in fast.uses[use].parameters())
    return fast


FOLDED = {"cnn": 3, "resnet18": 20, "preactresnet18": 8, "wrn16-2": 6}  # BatchNorms that nothing else stands before


@pytest.mark.parametrize("name", FOLDED)
def test_the_attacks_network_is_the_model_and_follows_its_updates(name, x):
    fast = check_follows(speed, name, x)
    norms = lambda model: sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert norms(fast.model) - norms(fast.uses["eval"]) == FOLDED[name]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("own.data = shared.data", "own.data = shared.data.clone()"),
        ("            fold(self.folds)\n", "            pass\n"),
        ("(bn.running_var + bn.eps).rsqrt()", "bn.running_var.rsqrt()"),
        ("scale * bn.running_mean", "bn.running_mean"),
        ("copy.deepcopy(model).requires_grad_(False)", "copy.deepcopy(model)"),
    ],
)
def test_another_network_under_attack_is_rejected(x, old, new):
    with pytest.raises(AssertionError):
        check_follows(mutant_module(speed, (old, new)), "cnn", x)


def test_a_convolution_that_something_else_reads_is_rejected(x, monkeypatch):
    monkeypatch.setattr(models.PreActResNet18, "conv_bn", (("conv1", "layer1.0.bn1"),), raising=False)
    with pytest.raises(AssertionError):
        check_follows(speed, "preactresnet18", x)


@pytest.mark.parametrize("method", METHODS)
def test_every_step_makes_the_same_update_through_a_fast_network(x, method):
    """In float64: weights, statistics and images are equal but for rounding."""
    method, x, y, ends = METHODS[method], x.double(), torch.arange(8), []
    settings = {**train_dynat.PAPER, **method, "steps": 2, "burn_in": 0, "awp_start": 1}
    chosen = {name: settings[name] for name in train_dynat.options(method) if name != "guide"}
    parameters = train_dynat.signature(method["step"]).parameters
    if "epoch" in parameters:
        chosen["epoch"] = 1
    if "noise" in parameters:
        chosen["noise"] = lambda k: 0.01 * k * x
    for wrap in (lambda model: model, Fast):
        networks = {}
        for role in ("target", "guide")[: 1 + ("guide" in parameters)]:
            torch.manual_seed(len(role))
            networks[role] = build_model("cnn", 10).double()
        optimizer = torch.optim.SGD([w for model in networks.values() for w in model.parameters()], lr=0.1)
        fast = {role: wrap(model) for role, model in networks.items()}
        for _ in range(2):
            x_adv, _ = method["step"](**fast, optimizer=optimizer, x=x, y=y, start=x + 0.001, **chosen)
        ends.append([x_adv, *(value for model in networks.values() for value in model.state_dict().values())])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# compiled

RUN = ["--dataset", "tiny", "--train-images", "50", "--batch-size", "20", "--epochs", "3", "--steps", "2"]


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(data, "TINY_SIZE", {"train": 100, "test": 20})


def check_no_recompilation(out, method):
    """From the second epoch on, nothing is compiled any more: modes, gradients or not, the last, smaller batch."""
    train_epoch = train_dynat.train_epoch

    def watched(networks, averaged, optimizer, images, settings, epoch, *others):
        with torch.compiler.set_stance("default" if epoch == 1 else "fail_on_recompile"):
            return train_epoch(networks, averaged, optimizer, images, settings, epoch, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dynat, "train_epoch", watched)
        assert main([*RUN, "--method", method, "--compile", "--out", str(out)]) == 0


@pytest.mark.parametrize("method", ["dynat", "dynat-inner-awp", "pgd-at"])
def test_nothing_is_compiled_again_after_the_first_epoch(tmp_path, quick_compile, few_images, method):
    check_no_recompilation(tmp_path / "a", method)


def test_a_compiled_network_of_changing_mode_is_rejected(tmp_path, quick_compile, few_images, monkeypatch):
    """One that has a new mode in the second epoch, as a sign that the check sees it."""

    def once(network, **options):
        compiled = torch._dynamo.optimize("aot_eager", dynamic=False)(network)
        calls = []

        def call(x):
            calls.append(None)
            network.bn1.momentum = 0.1 + 0.001 * len(calls)
            return compiled(x)

        return call

    monkeypatch.setattr(torch, "compile", once)
    with pytest.raises(RuntimeError, match="recompil"):
        check_no_recompilation(tmp_path / "a", "dynat")


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_compiled_run_follows_the_exact_one(tmp_path, quick_compile, few_images):
    assert main([*RUN, "--out", str(tmp_path / "exact")]) == 0
    assert main([*RUN, "--compile", "--out", str(tmp_path / "compiled")]) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "exact"), rel=1e-3)


def test_a_compiled_attack_computes_no_gradient_of_the_weights(model, x, quick_compile):
    """Its compiled backward returns as many gradients as it has inputs that ask for one: the images alone."""
    fast = Fast(model, bf16=False, compiled=True)
    with eval_mode(fast):
        logits = fast(x.clone().requires_grad_())
    asked = [node for node, _ in logits.grad_fn.next_functions if node is not None]
    assert len(asked) == 1
    update = fast(x)
    assert len([node for node, _ in update.grad_fn.next_functions if node is not None]) == len([*model.parameters()])


def graph_of(call, sample):
    """Stands in for CUDA's graph where there is no GPU: like it, it keeps one place for its logits."""
    place = {}

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch.enable_grad():
                ctx.x = x.detach().requires_grad_()
                ctx.logits = call(ctx.x)
            place.setdefault("logits", torch.empty_like(ctx.logits)).copy_(ctx.logits.detach())
            return place["logits"].detach()

        @staticmethod
        def backward(ctx, gradient):
            return torch.autograd.grad(ctx.logits, ctx.x, gradient)

    return Replay.apply


def check_graphs(model, x, monkeypatch, network):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graph_of)
    fast = network(model, bf16=False, compiled=False)
    fast.capture = True
    attack = lambda model, x: linf_pgd(model, x, x, lambda z: z[:, 0].sum(), **BUDGET, steps=3)
    plain = Fast(model)
    with eval_mode(fast), eval_mode(plain):
        assert torch.equal(attack(fast, x), attack(plain, x))
        assert torch.equal(attack(fast, x[:3]), attack(plain, x[:3]))  # the last, smaller batch
        first = fast(x.clone().requires_grad_())
        kept = first.clone()
        fast((x + 0.1).requires_grad_())
        assert torch.equal(first, kept)  # not overwritten by the next forward
    assert len(fast.graphs) == 2


def test_a_captured_attack_makes_the_same_images_and_keeps_its_logits(model, x, monkeypatch):
    check_graphs(model, x, monkeypatch, Fast)


def test_logits_that_the_next_forward_overwrites_are_rejected(model, x, monkeypatch):
    broken = mutant_module(speed, ("self.graphs[x.shape](x).clone()", "self.graphs[x.shape](x)")).Fast
    with pytest.raises(AssertionError):
        check_graphs(model, x, monkeypatch, broken)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_compiled_and_captured_attack_agrees_with_the_exact_one():
    torch.manual_seed(0)
    model = build_model("resnet18", 10).cuda().to(memory_format=torch.channels_last)
    x = torch.rand(16, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    fast = Fast(model, bf16=False, compiled=True)
    gradients = []
    for network in (model, fast, fast):
        with eval_mode(network):
            attacked = x.clone().requires_grad_()
            gradients += torch.autograd.grad(F.cross_entropy(network(attacked), torch.arange(16).cuda() % 10), attacked)
    assert fast.capture and len(fast.graphs) == 1
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-2, atol=1e-6)


# bf16


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that stands against the attack on 30 to 70 % of 2,000 images, and these images."""
    out = tmp_path_factory.mktemp("trained") / "a"
    argv = ["--dataset", "tiny", "--method", "mart", "--epochs", "2", "--steps", "2", "--train-images", "1500"]
    assert main([*argv, "--epsilon", "4/255", "--out", str(out)]) == 0
    model = build_model("cnn", 10)
    model.load_state_dict(torch.load(out / "weights.pt", weights_only=True))
    images = data.load_images("tiny", "train")
    return model.eval(), data.pixels(images.x[:2000]), images.y[:2000]


def standing(model, attacked, x, y):
    """The share of images that the float32 network still reads, after PGD-10 on the network `attacked`."""
    objective = lambda logits: F.cross_entropy(logits, y, reduction="sum")
    with eval_mode(attacked):
        x_adv = linf_pgd(attacked, x, x, objective, **BUDGET, steps=10)
    assert x_adv.dtype == torch.float32 and ((x_adv - x).abs() <= 8 / 255 + 1e-6).all()
    with torch.no_grad():
        return (model(x_adv).argmax(1) == y).double().mean().item()


def test_the_bf16_attack_reaches_the_accuracy_of_the_float32_attack(trained):
    model, x, y = trained
    exact = standing(model, model, x, y)
    assert 0.3 < exact < 0.7
    assert abs(standing(model, Fast(model, bf16=True, compiled=False), x, y) - exact) < 0.005


def test_a_weaker_attack_is_rejected(trained):
    """One whose gradients are those of images rounded to quarters."""
    model, x, y = trained

    class Coarse(Fast):
        def forward(self, x):
            return super().forward((x * 4).round() / 4 + (x - x.detach()))

    assert abs(standing(model, Coarse(model, bf16=True, compiled=False), x, y) - standing(model, model, x, y)) > 0.005


def test_losses_in_bf16_follow_the_exact_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TINY_SIZE", {"train": 600, "test": 50})
    argv = ["--dataset", "tiny", "--epochs", "4", "--steps", "3", "--lr", "0.03"]
    assert main([*argv, "--out", str(tmp_path / "fp32")]) == 0
    assert main([*argv, "--precision", "bf16", "--out", str(tmp_path / "bf16")]) == 0
    exact, bf16 = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert bf16 != exact and bf16 == pytest.approx(exact, rel=0.05)
    last = torch.load(tmp_path / "bf16" / "last.pt", weights_only=True)
    assert all(value.dtype in (torch.float32, torch.int64) for value in last["target"].values())


def test_tf32_is_on_inside_alone():
    before = torch.backends.cudnn.conv.fp32_precision
    with speed.tf32(True):
        assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cudnn.conv.fp32_precision == before
