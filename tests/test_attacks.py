"""What holds for the attack on any images, start, step size and objective, each with mutants that break it."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import mutant
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import attacks
from attacks import eval_mode, linf_pgd, margin, near_start, uniform_start
from losses import kl_divergence
from models import build_model


def small_net(seed=0, num_classes=4):
    """A network with BatchNorm whose running statistics are not the initial ones, in float64 and eval mode."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, num_classes)
    ).double()
    net(torch.rand(16, 3, 4, 4, dtype=torch.float64))
    return net.eval()


def images(seed, batch=5):
    """Images of 4x4 pixels with exact zeros and ones among them, and labels."""
    draws = torch.Generator().manual_seed(seed)
    x = (torch.rand(batch, 3, 4, 4, generator=draws, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    return x, torch.randint(0, 4, (batch,), generator=draws)


def objectives(net, x, y):
    clean = net(x).detach()
    return {
        "cross-entropy": lambda z: F.cross_entropy(z, y, reduction="sum"),
        "kl": lambda z: kl_divergence(clean, z).sum(),
        "margin": lambda z: -margin(z, y).sum(),
        "descent": lambda z: -F.cross_entropy(z, y, reduction="sum"),
    }


OBJECTIVES = ["cross-entropy", "kl", "margin", "descent"]
budgets = {
    "seed": st.integers(0, 10_000),
    "objective": st.sampled_from(OBJECTIVES),
    "epsilon": st.sampled_from([0.0, 0.031, 8 / 255, 0.3, 1.0]),
    "step_size": st.sampled_from([0.0, 0.007, 2 / 255, 0.5, 3.0]),
    "steps": st.integers(1, 4),
    "spread": st.sampled_from([0.0, 0.001, 0.05, 2.0]),  # how far from x the attack begins
}


def check_ball_and_pixel_range(attack, seed, objective, epsilon, step_size, steps, spread):
    net, (x, y) = small_net(), images(seed)
    start = x + spread * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    wanted = objectives(net, x, y)[objective]
    x_adv = attack(net, x, start, wanted, epsilon=epsilon, step_size=step_size, steps=steps)
    assert (x_adv <= x + epsilon).all() and (x_adv >= x - epsilon).all()
    assert (x_adv >= 0).all() and (x_adv <= 1).all()
    assert not x_adv.requires_grad


@given(**budgets)
def test_every_image_stays_in_the_ball_and_in_the_pixel_range(**budget):
    check_ball_and_pixel_range(linf_pgd, **budget)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.clamp(torch.clamp(x_adv.detach() + step, low, high), 0, 1)", "torch.clamp(x_adv + step, low, high)"),
        ("torch.clamp(torch.clamp(x_adv.detach() + step, low, high), 0, 1)", "torch.clamp(x_adv + step, 0, 1)"),
        ("low, high = x - epsilon, x + epsilon", "low, high = start - epsilon, start + epsilon"),
        ("low, high = x - epsilon, x + epsilon", "low, high = x - 1.01 * epsilon, x + 1.01 * epsilon"),
    ],
)
def test_an_attack_that_leaves_the_ball_is_rejected(old, new):
    broken = mutant(linf_pgd, (old, new))
    budget = {"objective": "cross-entropy", "epsilon": 0.031, "step_size": 0.5, "steps": 2, "spread": 0.05}
    with pytest.raises(AssertionError):
        check_ball_and_pixel_range(broken, seed=0, **budget)


def check_batch_equals_single_images(attack, seed, objective, epsilon, step_size, steps, spread):
    net, (x, y) = small_net(), images(seed)
    draws = torch.Generator().manual_seed(seed)
    start = x + spread * torch.randn(x.shape, generator=draws, dtype=x.dtype)
    budget = {"epsilon": epsilon, "step_size": step_size, "steps": steps}

    def run(i):
        active = lambda z: z.argmax(1) == y[i]
        return attack(net, x[i], start[i], objectives(net, x[i], y[i])[objective], active=active, **budget)

    together = run(slice(None))
    for i in range(len(x)):
        assert torch.equal(together[i], run(slice(i, i + 1))[0]), f"image {i}"


@given(**budgets)
def test_pgd_on_a_batch_equals_pgd_on_each_image(**budget):
    check_batch_equals_single_images(linf_pgd, **budget)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("gradient.sign()", "(gradient - gradient.mean(0)).sign()"),
        ("active(logits.detach())", "active(logits.detach()).roll(1)"),
    ],
)
def test_an_attack_that_mixes_images_is_rejected(old, new):
    budget = {"objective": "margin", "epsilon": 0.3, "step_size": 0.05, "steps": 3, "spread": 0.0}
    with pytest.raises(AssertionError):
        check_batch_equals_single_images(mutant(linf_pgd, (old, new)), seed=0, **budget)


def check_nothing_is_touched(attack, switch):
    """In eval mode the attack leaves modes, gradients, buffers, weights and random state as they were."""
    net, (x, y) = small_net().train(), images(0)
    net[3].eval()  # a submodule with a flag of its own
    net(x).sum().backward()  # gradients that are there must stay
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = [weight.grad.clone() for weight in net.parameters()]
    flags = [module.training for module in net.modules()]
    random_state = torch.get_rng_state()
    needs = [weight.requires_grad for weight in net.parameters()]
    with switch(net):
        assert not any(module.training for module in net.modules())
        attack(net, x, x, objectives(net, x, y)["cross-entropy"], epsilon=0.1, step_size=0.05, steps=2)
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(w.grad, g) for w, g in zip(net.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [weight.requires_grad for weight in net.parameters()] == needs
    assert not x.requires_grad


def test_attack_leaves_modes_gradients_batchnorm_and_random_state_untouched():
    check_nothing_is_touched(linf_pgd, eval_mode)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("logits = model(x_adv)", "logits = model.train()(x_adv)"),
        ("(gradient,) = torch.autograd.grad(objective(logits), x_adv)",
         "x_adv.grad = None; objective(logits).backward(); gradient = x_adv.grad"),
        ("x_adv = start.detach()", "x_adv = start.detach() + 0.01 * torch.randn_like(start)"),
    ],
)  # fmt: skip
def test_an_attack_that_touches_something_is_rejected(old, new):
    with pytest.raises(AssertionError):
        check_nothing_is_touched(mutant(linf_pgd, (old, new)), eval_mode)


@pytest.mark.parametrize(
    ("old", "new"), [("module.training = training", "module.training = True"), ("model.eval()", "pass")]
)
def test_a_switch_that_forgets_flags_is_rejected(old, new):
    with pytest.raises(AssertionError):
        check_nothing_is_touched(linf_pgd, mutant(attacks.eval_mode, (old, new)))


def test_eval_mode_is_undone_after_an_error():
    net = small_net().train()
    with pytest.raises(RuntimeError, match="inside"), eval_mode(net):
        raise RuntimeError("inside")
    assert all(module.training for module in net.modules())


def check_attack_attacks(attack):
    net, (x, y) = small_net(), images(3, batch=20)
    loss = objectives(net, x, y)["cross-entropy"]
    x_adv = attack(net, x, x, loss, epsilon=0.1, step_size=0.03, steps=5)
    assert loss(net(x_adv)) > loss(net(x)) + 0.1


def test_the_objective_grows():
    check_attack_attacks(linf_pgd)


@pytest.mark.parametrize(("old", "new"), [("step_size * gradient", "-step_size * gradient"), ("range(steps)", "[]")])
def test_an_attack_that_does_nothing_or_the_opposite_is_rejected(old, new):
    with pytest.raises(AssertionError):
        check_attack_attacks(mutant(linf_pgd, (old, new)))


def test_a_constant_objective_leaves_the_start_where_it_is():
    net, (x, _) = small_net(), images(1)
    x_adv = linf_pgd(net, x, x, lambda z: 0 * z.sum(), epsilon=0.1, step_size=0.05, steps=3)
    assert torch.equal(x_adv, x)


def check_active_and_noise(attack):
    net, (x, y) = small_net(), images(2)
    asked, drawn = [], []

    def active(logits):
        asked.append(logits)
        assert logits.shape == (len(x), 4) and not logits.requires_grad
        return torch.arange(len(x)) % 2 == 0

    def noise(k):
        drawn.append(k)
        return torch.full_like(x, 0.01)

    objective = objectives(net, x, y)["cross-entropy"]
    x_adv = attack(net, x, x, objective, epsilon=0.5, step_size=0.0, steps=3, active=active, noise=noise)
    assert len(asked) == 3 and drawn == [0, 1, 2]
    assert torch.equal(asked[0], net(x).detach())  # asked about the iterate that has not moved yet
    expected = x.clone()
    expected[::2] = (((x[::2] + 0.01).clamp(0, 1) + 0.01).clamp(0, 1) + 0.01).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-15)


def test_only_active_images_move_and_noise_enters_every_step():
    check_active_and_noise(linf_pgd)


@pytest.mark.parametrize(
    ("old", "new"), [("step = step + noise(k)", "noise(k)"), ("moved, x_adv.detach())", "moved, moved)")]
)
def test_an_attack_without_noise_or_mask_is_rejected(old, new):
    with pytest.raises(AssertionError):
        check_active_and_noise(mutant(linf_pgd, (old, new)))


@given(seed=st.integers(0, 1000), label=st.integers(0, 4), kappa=st.sampled_from([0.0, 3.0]))
def test_margin_is_the_labels_logit_minus_the_best_other(seed, label, kappa):
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed)) + kappa
    row = logits[0].tolist()
    expected = row[label] - max(value for c, value in enumerate(row) if c != label)
    assert math.isclose(margin(logits, torch.tensor([label])).item(), expected, abs_tol=1e-6)


def test_margin_of_a_tie_is_zero():
    assert margin(torch.tensor([[2.0, 2.0, 1.0]]), torch.tensor([0])).item() == 0


@pytest.mark.parametrize("epsilon", [0.031, 8 / 255])
def test_starts_depend_on_their_generator_alone(epsilon):
    x, _ = images(5)
    draw = lambda seed: torch.Generator().manual_seed(seed)
    near, uniform = near_start(x, draw(1)), uniform_start(x, epsilon, draw(1))
    assert torch.equal(near, near_start(x, draw(1))) and not torch.equal(near, near_start(x, draw(2)))
    assert torch.equal(uniform, uniform_start(x, epsilon, draw(1)))
    assert 0.0005 < (near - x).std() < 0.0015
    assert (uniform >= 0).all() and (uniform <= 1).all() and ((uniform - x).abs() <= epsilon + 1e-12).all()
    inside = (x > epsilon) & (x < 1 - epsilon)
    assert (uniform - x)[inside].abs().max() > 0.8 * epsilon


def test_fgsm_is_one_full_step_wherever_the_gradient_is_not_zero():
    net, (x, y) = small_net(), images(6)
    x_adv = linf_pgd(net, x, x, objectives(net, x, y)["cross-entropy"], epsilon=0.1, step_size=0.1, steps=1)
    moved = (x_adv - x).abs()
    boxed = torch.minimum(torch.full_like(x, 0.1), torch.where(x_adv > x, 1 - x, x))
    torch.testing.assert_close(moved, torch.where(moved > 0, boxed, moved))
    assert (moved > 0).float().mean() > 0.5


def test_the_attack_asks_the_network_once_per_step():
    net, calls = build_model("cnn", 4).eval(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    x = torch.rand(2, 3, 32, 32)
    linf_pgd(net, x, x, lambda z: z.sum(), epsilon=0.1, step_size=0.1, steps=7)
    assert len(calls) == 7
