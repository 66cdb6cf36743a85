"""What makes updates faster, around the networks: a step calls them as it always does and need not know.

    fast = Fast(model, bf16=True, compiled=True)
    logits = fast(x)                               # (B, C) float32, model(x) but for rounding

The attack forwards one network ten times and asks for the images' gradient alone. So its network holds the weights as
constants (a compiled one would compute their gradients as well), and in eval mode BatchNorm's scale and shift lie in
the weights of the convolution before it.
"""

import copy
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn


@contextmanager
def tf32(allowed):
    """Inside the `with`, where it is `allowed`, NVIDIA GPUs multiply float32 numbers of TF32's 11 significant bits."""
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    former = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for part, precision in zip(parts, former, strict=True):
            part.fp32_precision = precision


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """The memory layout of networks and images: channels_last, but NCHW on a GPU in "fp32".

    NVIDIA's float32 convolutions without TF32 may be slower in channels_last (pytorch#44943). cuDNN works in
    channels_last as soon as the images or the weights are, so both must have this layout.
    """
    full_float32 = device.type == "cuda" and precision == "fp32"
    return torch.contiguous_format if full_float32 else torch.channels_last


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, for parameters and BatchNorm statistics; counters are copied.

    `ema` is a deep copy of `model`. A decay of 0 makes them equal. Nothing is read from the device or sent to it.
    """
    old, new = [*ema.parameters(), *ema.buffers()], [*model.parameters(), *model.buffers()]
    pairs = list(zip(old, new, strict=True))
    averages, values = zip(*[pair for pair in pairs if pair[0].is_floating_point()], strict=True)
    torch._foreach_lerp_(averages, values, 1 - decay)
    for counter, value in pairs:
        if not counter.is_floating_point():
            counter.copy_(value)


class Fast(nn.Module):
    """model(x), but for rounding: in bf16 but for the classifier where `bf16`, by torch.compile where `compiled`.

    Images (B, 3, H, W) in [0, 1] to logits (B, C) float32. Where x asks for a gradient its weights do not: that is the
    attack. Parameters, buffers and modes are the model's own, and must stay where they are in memory. In eval mode the
    weights are those of the moment in which it began.
    """

    def __init__(self, model, bf16=False, compiled=False):
        super().__init__()
        self.model, self.bf16, self.compiled = model, bf16, compiled
        self.uses, self.folds = {}, []
        self.capture = compiled and next(model.parameters()).is_cuda
        self.graphs = {}  # of the attack in eval mode, by the shape of its images

    def network(self, use):
        """For "update" the model itself; under attack, for "train" and "eval", one of its own whose mode never changes:
        a compiled one would be compiled anew. Made when first asked for, since a guide is never attacked."""
        if use not in self.uses:
            network = self.model
            if use == "train":
                network = frozen(self.model).train()
            elif use == "eval":
                network, self.folds = folded(self.model)
            if self.compiled:
                torch._dynamo.config.recompile_limit = 64  # of one code for all networks, uses and batch sizes of a run
                network = torch.compile(network, dynamic=False)
            self.uses[use] = network
        return self.uses[use]

    def train(self, mode=True):
        if not mode:
            self.network("eval")
            fold(self.folds)
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return self.call("train" if x.requires_grad else "update", x)
        if not (self.capture and x.requires_grad):
            return self.call("eval", x)
        if x.shape not in self.graphs:
            # Forward and backward as CUDA graphs: their hundreds of kernels are launched at once.
            sample = x.detach().clone().requires_grad_()
            self.graphs[x.shape] = torch.cuda.make_graphed_callables(partial(self.call, "eval"), (sample,))
        return self.graphs[x.shape](x).clone()  # its next run overwrites the logits

    def call(self, use, x):
        # Without autocast's cache: a weight is used once in a forward, and a graph must not depend on it.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return self.network(use)(x)  # (B, C)


def frozen(model):
    """The same network over the same weights and buffers, which asks for no gradient of the weights."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for own, shared in zip([*twin.parameters(), *twin.buffers()], [*model.parameters(), *model.buffers()], strict=True):
        own.data = shared.data
    return twin


def folded(model):
    """A frozen network in eval mode without the BatchNorms that alone read a convolution's output (`conv_bn` in
    models.py); and for `fold` each such convolution of it, with the convolution and BatchNorm of `model` behind it."""
    twin, folds = frozen(model).eval(), []
    for part, own in zip(list(twin.modules()), list(model.modules()), strict=True):
        present = {name for name, _ in own.named_modules()}
        for conv, bn in getattr(part, "conv_bn", ()):
            if conv in present:  # some shortcuts are the identity
                target, source = part.get_submodule(conv), own.get_submodule(conv)
                target.weight = nn.Parameter(source.weight.detach().clone(), requires_grad=False)
                target.bias = nn.Parameter(torch.zeros_like(source.weight[:, 0, 0, 0]), requires_grad=False)
                folds.append((target, source, own.get_submodule(bn)))
                part.set_submodule(bn, nn.Identity())
    return twin, folds


@torch.no_grad()
def fold(folds):
    """bn(conv(x)) = conv'(x) in eval mode, with s = bn.weight / sqrt(var + eps): w' = s w, b' = bn.bias - s mean."""
    for target, conv, bn in folds:
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        torch.mul(conv.weight, scale.view(-1, 1, 1, 1), out=target.weight)
        torch.sub(bn.bias, scale * bn.running_mean, out=target.bias)
