"""What the authors' releases do for one update, at their cost and in their order: what step.py measures against.

Written from what the releases compute, not copied from them: the same forwards and backwards, each where it stands
there, and the same weights afterwards (tests/test_benchmarks.py). Images and networks are NCHW and float32, batches and
starts are made on the host. Left out is what costs nothing beside a network: terms computed from logits and thrown
away, logging, DataParallel around one device. Also left out are the normalisation of PGD-AT and AT-AWP and the layers
that some releases hold and never call.

`RELEASES` maps a method to its update, which takes the arguments of the project's own step, and for AWP a second
network like the target, `proxy`. FAT and SAT are not transcribed; the hybrids and MAIL (MSE) have no release.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

AWP_KL_WEIGHT = 6.0


def pgd(x, start, objective, *, epsilon, step_size, steps, weights_too=False):
    """PGD, where `objective` maps images to a scalar and forwards whatever the release forwards at every step.

    weights_too   the gradient comes from `backward`, which makes those of the weights as well, and keeps them.
    """
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = objective(x_adv)
        if weights_too:
            loss.backward()
            gradient = x_adv.grad
        else:
            (gradient,) = torch.autograd.grad(loss, [x_adv])
        x_adv = x_adv.detach() + step_size * torch.sign(gradient)
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    return x_adv.detach()


def kl(clean_logits, adv_logits):
    """KL(clean || adversarial), summed over the batch."""
    return F.kl_div(F.log_softmax(adv_logits, 1), F.softmax(clean_logits, 1), reduction="sum")


def kl_attack(target, x, start, **budget):
    """TRADES' attack: the clean logits are made anew at every step, with a graph that nothing uses."""
    target.eval()
    x_adv = pgd(x, start, lambda x_adv: kl(target(x), target(x_adv)), **budget)
    target.train()
    return x_adv


def label_attack(target, guide, x, start, **budget):
    """Eq. (7): the guide is asked for its labels, with a graph, at every step."""
    target.eval()
    x_adv = pgd(x, start, lambda x_adv: F.cross_entropy(target(x_adv), guide(x).argmax(1)), **budget)
    target.train()
    return x_adv


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@contextmanager
def perturbed(target, proxy, gamma, objective):
    """AWP: the target's whole state goes into the proxy, which makes an SGD step up the objective; how its weights then
    differ, scaled to the target's own, is on the target inside the `with`."""
    proxy.load_state_dict(target.state_dict())
    proxy.train()
    update(torch.optim.SGD(proxy.parameters(), lr=0.01), -objective(proxy))
    differences = {}
    for (name, old), new in zip(target.state_dict().items(), proxy.state_dict().values(), strict=True):
        if old.dim() > 1 and "weight" in name:
            moved = new - old
            differences[name] = old.norm() / (moved.norm() + 1e-20) * moved

    @torch.no_grad()
    def add(size):
        for name, weight in target.named_parameters():
            if name in differences:
                weight.add_(size * differences[name])

    add(gamma)
    yield
    add(-gamma)


def trades_objective(model, x, x_adv, y, weight):
    """TRADES' loss: its KL term forwards the clean images a second time."""
    loss = F.cross_entropy(model(x), y)
    adv_logits = model(x_adv)
    return loss + weight * kl(model(x), adv_logits) / len(x)


def dynat(target, guide, optimizer, x, y, start, *, inner, beta, clean_forward, **budget):
    """dynat.py; with `inner` False its commented-out KL attack."""
    x_adv = label_attack(target, guide, x, start, **budget) if inner else kl_attack(target, x, start, **budget)
    adv_logits = target(x_adv)
    clean_logits = target(x) if clean_forward else None  # in no loss, but its graph stays until the update is over
    guide_logits = guide(x)
    update(optimizer, F.cross_entropy(guide_logits, y) + beta * F.cross_entropy(adv_logits, guide_logits.argmax(1)))
    del clean_logits


def dynat_awp(
    target, guide, optimizer, x, y, start, *,
    proxy, inner, beta, kl_weight, awp_gamma, awp_start, epoch, **budget,
):  # fmt: skip
    """AWP_dynat.py; with `inner` its commented-out attack on the labels."""
    x_adv = label_attack(target, guide, x, start, **budget) if inner else kl_attack(target, x, start, **budget)
    objective = lambda model: trades_objective(model, x, x_adv, y, AWP_KL_WEIGHT)
    with perturbed(target, proxy, awp_gamma, objective) if epoch >= awp_start else nullcontext():
        adv_logits, clean_logits = target(x_adv), target(x)
        labels = guide(x).argmax(1)
        loss = F.cross_entropy(guide(x), y) + beta * F.cross_entropy(adv_logits, labels)
        update(optimizer, loss + kl_weight * kl(clean_logits, adv_logits) / len(x))


def lbgat(target, guide, optimizer, x, y, start, *, kl_weight, **budget):
    """lbgat.py."""
    x_adv = kl_attack(target, x, start, **budget)
    adv_logits, clean_logits, guide_logits = target(x_adv), target(x), guide(x)
    loss = F.mse_loss(adv_logits, guide_logits) + F.cross_entropy(guide_logits, y)
    update(optimizer, loss + kl_weight * kl(clean_logits, adv_logits) / len(x))


def trades(target, optimizer, x, y, start, *, kl_weight, **budget):
    """trades.py."""
    x_adv = kl_attack(target, x, start, **budget)
    update(optimizer, trades_objective(target, x, x_adv, y, kl_weight))


def trades_awp(target, optimizer, x, y, start, *, proxy, kl_weight, awp_gamma, awp_start, epoch, **budget):
    """trades_AWP/train_trades_cifar.py."""
    x_adv = kl_attack(target, x, start, **budget)
    objective = lambda model: trades_objective(model, x, x_adv, y, kl_weight)
    with perturbed(target, proxy, awp_gamma, objective) if epoch >= awp_start else nullcontext():
        adv_logits = target(x_adv)
        loss = F.cross_entropy(target(x), y)
        update(optimizer, loss + kl_weight * kl(target(x), adv_logits) / len(x))


def train_mode_attack(target, x, y, start, **budget):
    """PGD in train mode, and the forward for the loss by which the best of one restart is chosen."""
    x_adv = pgd(x, start, lambda x_adv: F.cross_entropy(target(x_adv), y), weights_too=True, **budget)
    target(x_adv)
    return x_adv


def pgd_at(target, optimizer, x, y, start, **budget):
    """train_cifar10.py of robust_overfitting."""
    x_adv = train_mode_attack(target, x, y, start, **budget)
    update(optimizer, F.cross_entropy(target(x_adv), y))
    target(x)  # for the books


def at_awp(target, optimizer, x, y, start, *, proxy, awp_gamma, awp_start, epoch, **budget):
    """AT_AWP/train_cifar10.py."""
    x_adv = train_mode_attack(target, x, y, start, **budget)
    objective = lambda model: F.cross_entropy(model(x_adv), y)
    with perturbed(target, proxy, awp_gamma, objective) if epoch >= awp_start else nullcontext():
        update(optimizer, F.cross_entropy(target(x_adv), y))
    target(x)  # for the books


def mart(target, optimizer, x, y, start, *, kl_weight, **budget):
    """mart.py."""
    target.eval()
    x_adv = pgd(x, start, lambda x_adv: F.cross_entropy(target(x_adv), y), **budget)
    target.train()
    clean_logits, adv_logits = target(x), target(x_adv)
    p, q = F.softmax(clean_logits, 1), F.softmax(adv_logits, 1)
    largest = q.argsort(1)[:, -2:]
    other = torch.where(largest[:, -1] == y, largest[:, -2], largest[:, -1])
    loss = F.cross_entropy(adv_logits, y) + F.nll_loss((1.0001 - q + 1e-12).log(), other)
    sure = p.gather(1, y.unsqueeze(1)).squeeze(1)
    divergence = F.kl_div((q + 1e-12).log(), p, reduction="none").sum(1)
    update(optimizer, loss + kl_weight * (divergence * (1.0000001 - sure)).mean())


def mail(target, optimizer, x, y, start, *, burn_in, epoch, **budget):
    """mail_loss.py, its MAIL-AT."""
    target.eval()
    x_adv = pgd(x, start, lambda x_adv: F.cross_entropy(target(x_adv), y), **budget)
    target.train()
    adv_logits = target(x_adv)
    losses = F.cross_entropy(adv_logits, y, reduction="none")
    if epoch > burn_in:
        p = F.softmax(adv_logits.detach(), 1)
        label = F.one_hot(y, p.shape[1]).bool()
        margin = p.masked_fill(label, 0).amax(1) - p[label]
        losses = 3 * torch.sigmoid(10 * (margin - 0.5)) * losses
    update(optimizer, losses.mean())


def gairat(target, optimizer, x, y, start, *, burn_in, epoch, steps, **budget):
    """GAIRAT.py: each image's iterates are counted one by one, on the host."""
    kappa = torch.zeros(len(x))

    def counted(x_adv):
        logits = target(x_adv)
        decisions = logits.argmax(1)
        for i in range(len(x)):
            if decisions[i] == y[i]:
                kappa[i] += 1
        target.zero_grad()
        return F.cross_entropy(logits, y)

    target.eval()
    x_adv = pgd(x, start, counted, steps=steps, weights_too=True, **budget)
    target.train()
    losses = F.cross_entropy(target(x_adv), y, reduction="none")
    if epoch > burn_in:
        weights = (1 + torch.tanh(-1 + 5 * (1 - 2 * kappa / steps))) / 2
        losses = (weights * len(weights) / weights.sum()).to(x.device) * losses
    update(optimizer, losses.mean())


RELEASES = {
    "dynat": dynat,
    "dynat-inner": dynat,
    "dynat-awp": dynat_awp,
    "dynat-inner-awp": dynat_awp,
    "pgd-at": pgd_at,
    "trades": trades,
    "mart": mart,
    "gairat": gairat,
    "mail": mail,
    "at-awp": at_awp,
    "trades-awp": trades_awp,
    "lbgat": lbgat,
}


class HostImages(Dataset):
    """One image at a time, padded, cropped, flipped and turned into a float tensor by Pillow and torchvision."""

    def __init__(self, images):
        self.x, self.y = [to_pil_image(image) for image in images.x.cpu()], images.y.tolist()
        self.transform = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.transform(self.x[i]), self.y[i]


def loader(images, batch_size, device):
    """The releases' shuffled DataLoader with one worker, which stays between the epochs."""
    pin = device.type == "cuda"
    return DataLoader(
        HostImages(images), batch_size, shuffle=True, num_workers=1, pin_memory=pin, persistent_workers=True
    )


def near_start(x):
    """x + 0.001 * N(0, 1), drawn on the host."""
    return x + 0.001 * torch.randn(x.shape).to(x.device)


def uniform_start(x, epsilon):
    """clamp( x + U(-epsilon, epsilon), 0, 1 ), drawn on the host."""
    return torch.clamp(x + torch.empty(x.shape).uniform_(-epsilon, epsilon).to(x.device), 0.0, 1.0)
