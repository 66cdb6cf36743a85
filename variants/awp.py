"""Adversarial weight perturbation (AWP; Wu et al., 2020): the update is made at the worst weights nearby.

v_l = |w_l| * g_l / |g_l|,  g the gradient of an objective in the weights      per convolution and linear weight l
w_l <- w_l + gamma * v_l;  the step, taken there;  w_l <- w_l - gamma * v_l
"""

from contextlib import contextmanager

import torch

from losses import sum_over_processes


@contextmanager
def weight_perturbation(target, objective, gamma):
    """w + gamma * v inside the `with`, w at its end plus whatever was added to the weights in between.

    target      in train mode. Its convolution and linear weights are perturbed, neither biases nor BatchNorm.
    objective   no argument to a scalar to be increased, a sum over the batch (of which only the gradient's direction
                counts), whose parts several processes may hold; it forwards the target, whose BatchNorm statistics are
                put back afterwards.
    gamma       the relative size: the perturbation of a weight tensor has gamma times its norm.

    The optimizer steps inside: weight decay and momentum see the perturbed weights, as in the release. That takes the
    gradient in a copy of the network, by an SGD step of its own; here it is asked of the network itself.
    Source: AWP, utils_awp.py.
    """
    weights = [p for name, p in target.named_parameters() if p.dim() > 1 and "weight" in name]
    statistics = [buffer.clone() for buffer in target.buffers()]
    gradients = sum_over_processes(*torch.autograd.grad(objective(), weights))
    with torch.no_grad():
        for buffer, former in zip(target.buffers(), statistics, strict=True):
            buffer.copy_(former)
        pairs = zip(weights, gradients, strict=True)
        perturbation = [gamma * w.norm() / (g.norm() + 1e-20) * g for w, g in pairs]  # where g = 0, none
        for w, v in zip(weights, perturbation, strict=True):
            w.add_(v)
    try:
        yield
    finally:
        with torch.no_grad():
            for w, v in zip(weights, perturbation, strict=True):
                w.sub_(v)
