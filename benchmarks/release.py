"""What the authors' releases compute in one update, at their cost and in their order: what step.py compares with.

Written from what the releases do, not copied from them: each forward and backward stands where it stands there, and the
weights afterwards are those of this project's step (tests/test_benchmarks.py). Left out are terms of logits that are
thrown away, logging, DataParallel, the normalisation of PGD-AT and AT-AWP, and layers that are held and never called.
With AWP an update takes a second network like the target, `proxy`, and always perturbs the weights.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F

from losses import kl_divergence


def pgd(x, start, objective, *, epsilon, step_size, steps, weights_too=False):
    """PGD. `objective` maps images to a scalar. With `weights_too` the weights' gradients are computed as well."""
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        objective(x_adv).backward(inputs=None if weights_too else [x_adv])
        x_adv = x_adv.detach() + step_size * torch.sign(x_adv.grad)
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    return x_adv.detach()


def eval_mode_attack(target, x, start, guide=None, **budget):
    """TRADES' attack: every step computes the clean logits anew, with a graph that nothing uses. With a guide Eq. (7):
    every step calls the guide for its labels, with a graph."""
    if guide is None:
        objective = lambda x_adv: kl_divergence(target(x), target(x_adv)).sum()
    else:
        objective = lambda x_adv: F.cross_entropy(target(x_adv), guide(x).argmax(1))
    target.eval()
    x_adv = pgd(x, start, objective, **budget)
    target.train()
    return x_adv


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@contextmanager
def perturbed(target, proxy, gamma, objective):
    """AWP: the target's whole state is copied to the proxy, which makes an SGD step up the objective. The change of its
    weights, scaled to the norm of the target's, is added to the target inside the `with`."""
    proxy.load_state_dict(target.state_dict())
    proxy.train()
    update(torch.optim.SGD(proxy.parameters(), lr=0.01), -objective(proxy))
    weights = [weight for weight in target.parameters() if weight.dim() > 1]
    moved = [weight for weight in proxy.parameters() if weight.dim() > 1]
    with torch.no_grad():
        changes = [new - old for old, new in zip(weights, moved, strict=True)]
        changes = [old.norm() / (v.norm() + 1e-20) * v for old, v in zip(weights, changes, strict=True)]
        torch._foreach_add_(weights, changes, alpha=gamma)
    yield
    with torch.no_grad():
        torch._foreach_add_(weights, changes, alpha=-gamma)


def trades_objective(model, x, x_adv, y, weight):
    """TRADES' loss: its KL term runs the clean images a second time."""
    loss = F.cross_entropy(model(x), y)
    adv_logits = model(x_adv)
    return loss + weight * kl_divergence(model(x), adv_logits).mean()


def dynat(target, guide, optimizer, x, y, start, *, inner, beta, clean_forward, **budget):
    """dynat.py; with `inner` False its commented-out KL attack."""
    x_adv = eval_mode_attack(target, x, start, guide if inner else None, **budget)
    adv_logits = target(x_adv)
    _ = target(x) if clean_forward else None  # in no loss, but its graph stays until the update is over
    guide_logits = guide(x)
    update(optimizer, F.cross_entropy(guide_logits, y) + beta * F.cross_entropy(adv_logits, guide_logits.argmax(1)))


def dynat_awp(target, guide, optimizer, x, y, start, *, proxy, inner, beta, kl_weight, awp_gamma, **budget):
    """AWP_dynat.py; with `inner` its commented-out attack on the labels."""
    x_adv = eval_mode_attack(target, x, start, guide if inner else None, **budget)
    objective = lambda model: trades_objective(model, x, x_adv, y, 6.0)  # whatever kl_weight is
    with perturbed(target, proxy, awp_gamma, objective):
        adv_logits, clean_logits = target(x_adv), target(x)
        labels = guide(x).argmax(1)
        loss = F.cross_entropy(guide(x), y) + beta * F.cross_entropy(adv_logits, labels)
        update(optimizer, loss + kl_weight * kl_divergence(clean_logits, adv_logits).mean())


def trades(target, optimizer, x, y, start, *, kl_weight, **budget):
    """trades.py."""
    x_adv = eval_mode_attack(target, x, start, **budget)
    update(optimizer, trades_objective(target, x, x_adv, y, kl_weight))


def trades_awp(target, optimizer, x, y, start, *, proxy, kl_weight, awp_gamma, **budget):
    """trades_AWP/train_trades_cifar.py."""
    x_adv = eval_mode_attack(target, x, start, **budget)
    objective = lambda model: trades_objective(model, x, x_adv, y, kl_weight)
    with perturbed(target, proxy, awp_gamma, objective):
        adv_logits = target(x_adv)
        loss = F.cross_entropy(target(x), y)
        update(optimizer, loss + kl_weight * kl_divergence(target(x), adv_logits).mean())


def pgd_at(target, optimizer, x, y, start, *, proxy=None, awp_gamma=0.0, **budget):
    """train_cifar10.py of robust_overfitting; with a proxy AT_AWP/train_cifar10.py."""
    objective = lambda model: F.cross_entropy(model(x_adv), y)
    x_adv = pgd(x, start, lambda x_adv: F.cross_entropy(target(x_adv), y), weights_too=True, **budget)
    target(x_adv)  # for the loss by which the best of one restart is chosen
    with perturbed(target, proxy, awp_gamma, objective) if proxy else nullcontext():
        update(optimizer, objective(target))
    target(x)  # for the log


RELEASES = {"dynat": dynat, "dynat-inner": dynat, "dynat-awp": dynat_awp, "dynat-inner-awp": dynat_awp}
RELEASES |= {"pgd-at": pgd_at, "trades": trades, "at-awp": pgd_at, "trades-awp": trades_awp}
