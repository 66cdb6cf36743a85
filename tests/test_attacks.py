"""What holds for the attack on any images, start, step size and objective."""

from unittest.mock import Mock, call

import pytest
import torch
import torch.nn.functional as F
from cases import TinyNet
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attacks import eval_mode, gaussian_start, linf_pgd, margin, uniform_start, weight_perturbation
from losses import kl_divergence


def small_net():
    """A network with BatchNorm whose running statistics are not the initial ones, in float64 and eval mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    net.double()(torch.rand(16, 3, 4, 4, dtype=torch.float64))
    return net.eval()


def images(seed, batch=5):
    """Images of 4x4 pixels with exact zeros and ones among them, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(batch, 3, 4, 4, generator=generator, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    return x, torch.randint(0, 4, (batch,), generator=generator)


def objective_called(name, net, x, y):
    clean = net(x).detach()
    return {
        "cross-entropy": lambda z: F.cross_entropy(z, y, reduction="sum"),
        "kl": lambda z: kl_divergence(clean, z).sum(),
        "margin": lambda z: -margin(z, y).sum(),
        "descent": lambda z: -F.cross_entropy(z, y, reduction="sum"),
    }[name]


budgets = {
    "seed": st.integers(0, 10_000),
    "objective": st.sampled_from(["cross-entropy", "kl", "margin", "descent"]),
    "epsilon": st.sampled_from([0.0, 0.031, 8 / 255, 0.3, 1.0]),
    "step_size": st.sampled_from([0.0, 0.007, 2 / 255, 0.5, 3.0]),
    "steps": st.integers(1, 4),
    "spread": st.sampled_from([0.0, 0.001, 0.05, 2.0]),  # how far from x the attack begins
}


def images_and_start(seed, spread):
    x, y = images(seed)
    return x, y, x + spread * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def check_ball_and_pixel_range(seed, objective, epsilon, spread, **budget):
    net, (x, y, start) = small_net(), images_and_start(seed, spread)
    x_adv = linf_pgd(net, x, start, objective_called(objective, net, x, y), epsilon=epsilon, **budget)
    assert (x_adv <= x + epsilon).all() and (x_adv >= x - epsilon).all()
    assert (x_adv >= 0).all() and (x_adv <= 1).all() and not x_adv.requires_grad


@given(**budgets)
def test_every_image_stays_in_the_ball_and_in_the_pixel_range(**budget):
    check_ball_and_pixel_range(**budget)


def check_batch_equals_single_images(seed, objective, spread, **budget):
    """The network takes one image at a time: where a gradient is 0 but for rounding, its sign would depend on the
    batch in which the convolutions see the image."""
    net, (x, y, start) = small_net(), images_and_start(seed, spread)
    one_by_one = lambda batch: torch.cat([net(image) for image in batch.split(1)])

    def run(i):
        wanted = objective_called(objective, one_by_one, x[i], y[i])
        return linf_pgd(one_by_one, x[i], start[i], wanted, active=lambda z: z.argmax(1) == y[i], **budget)

    together = run(slice(None))
    for i in range(len(x)):
        assert torch.equal(together[i], run(slice(i, i + 1))[0]), f"image {i}"


@given(**budgets)
def test_pgd_on_a_batch_equals_pgd_on_each_image(**budget):
    check_batch_equals_single_images(**budget)


def test_attack_leaves_modes_gradients_batchnorm_and_random_state_untouched():
    net, (x, y) = small_net().train(), images(0)
    net[3].eval()  # a submodule with a flag of its own
    net(x).sum().backward()  # gradients that are there must stay
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = [weight.grad.clone() for weight in net.parameters()]
    flags = [module.training for module in net.modules()]
    random_state = torch.get_rng_state()
    with eval_mode(net):
        assert not any(module.training for module in net.modules())
        linf_pgd(net, x, x, objective_called("cross-entropy", net, x, y), epsilon=0.1, step_size=0.05, steps=2)
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(w.grad, g) for w, g in zip(net.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(weight.requires_grad for weight in net.parameters()) and not x.requires_grad


def test_eval_mode_is_undone_after_an_error():
    net = small_net().train()
    with pytest.raises(RuntimeError, match="inside"), eval_mode(net):
        raise RuntimeError("inside")
    assert all(module.training for module in net.modules())


def test_the_objective_grows():
    net, (x, y) = small_net(), images(3, batch=20)
    loss = objective_called("cross-entropy", net, x, y)
    x_adv = linf_pgd(net, x, x, loss, epsilon=0.1, step_size=0.03, steps=5)
    assert loss(net(x_adv)) > loss(net(x)) + 0.1


def test_one_forward_per_step_where_noise_enters_and_only_active_images_move():
    net, (x, y) = small_net(), images(2)
    model, noise = Mock(side_effect=net), Mock(return_value=torch.full_like(x, 0.01))
    active = Mock(return_value=torch.arange(len(x)) % 2 == 0)
    objective = objective_called("cross-entropy", net, x, y)
    x_adv = linf_pgd(model, x, x, objective, epsilon=0.5, step_size=0.0, steps=3, active=active, noise=noise)
    assert model.call_count == active.call_count == 3
    assert noise.call_args_list == [call(0), call(1), call(2)]
    assert torch.equal(active.call_args_list[0].args[0], net(x))  # asked about the iterate that has not moved yet
    assert not any(logits.requires_grad for (logits,), _ in active.call_args_list)
    expected = x.clone()
    expected[::2] = (((x[::2] + 0.01).clamp(0, 1) + 0.01).clamp(0, 1) + 0.01).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-15)


def test_fgsm_is_one_full_step_wherever_the_gradient_is_not_zero():
    net, (x, y) = small_net(), images(6)
    x_adv = linf_pgd(net, x, x, objective_called("margin", net, x, y), epsilon=0.1, step_size=0.1, steps=1)
    moved = (x_adv - x).abs()
    boxed = torch.minimum(torch.full_like(x, 0.1), torch.where(x_adv > x, 1 - x, x))
    torch.testing.assert_close(moved, torch.where(moved > 0, boxed, moved))
    assert (moved > 0).float().mean() > 0.5
    assert torch.equal(linf_pgd(net, x, x, lambda z: 0 * z.sum(), epsilon=0.1, step_size=0.1, steps=3), x)


@given(row=st.lists(st.integers(-3, 3).map(float), min_size=5, max_size=5), label=st.integers(0, 4))
def test_margin_is_the_labels_logit_minus_the_best_other(row, label):
    expected = row[label] - max(row[:label] + row[label + 1 :])  # 0 at a tie
    assert margin(torch.tensor([row, row[::-1]]), torch.tensor([label, 4 - label])).tolist() == [expected] * 2


@pytest.mark.parametrize("epsilon", [0.031, 8 / 255])
def test_starts_depend_on_their_generator_alone(epsilon):
    x, _ = images(5)
    draw_gaussian = lambda seed: gaussian_start(x, torch.Generator().manual_seed(seed))
    draw_uniform = lambda seed: uniform_start(x, epsilon, torch.Generator().manual_seed(seed))
    for draw in (draw_gaussian, draw_uniform):
        assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    uniform = draw_uniform(1)
    assert 0.0005 < (draw_gaussian(1) - x).std() < 0.0015
    assert (uniform >= 0).all() and (uniform <= 1).all() and ((uniform - x).abs() <= epsilon + 1e-12).all()
    inside = (x > epsilon) & (x < 1 - epsilon)
    assert (uniform - x)[inside].abs().max() > 0.8 * epsilon


def test_inference_mode_is_named_where_an_attack_cannot_run():
    x = torch.rand(2, 3, 8, 8)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="rules out"):
        linf_pgd(TinyNet(), x, x, torch.sum, epsilon=0.1, step_size=0.1, steps=1)


def test_awp_leaves_frozen_and_unused_weights_alone_and_puts_statistics_back_after_an_error():
    net, x = TinyNet(), torch.rand(4, 3, 8, 8)
    net.conv1.requires_grad_(False)
    net.unused = torch.nn.Linear(2, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with weight_perturbation(net, lambda: net(x).square().sum(), 0.1):
        moved = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["conv2.weight", "linear.weight"]

    def fails():
        return net(x)[0, 99]

    with pytest.raises(IndexError), weight_perturbation(net, fails, 0.1):
        pass
    assert torch.equal(net.bn1.running_mean, before["bn1.running_mean"])
