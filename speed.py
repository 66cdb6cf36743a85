"""What makes training faster. `FastNetwork` is bf16, torch.compile and a captured attack around a network: a step calls
it as it calls the network itself. Then there are TF32, the memory layout, and the moving average of the weights (EMA).
Of this project it imports nothing.
"""

import copy
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def tf32(allowed: bool):
    """Inside the `with`, if `allowed`, float32 convolutions on NVIDIA GPUs use TF32. The classifier stays float32."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """The layout of images and weights: channels_last, but NCHW on a GPU in "fp32", where channels_last may be slower
    (pytorch#44943). cuDNN works in channels_last as soon as either is in it, so both must have this layout."""
    return torch.contiguous_format if device.type == "cuda" and precision == "fp32" else torch.channels_last


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, for parameters and BatchNorm statistics; integers are copied. `ema` is
    a deep copy of `model`. A decay of 0 makes them equal. Nothing is read from the device or sent to it."""
    pick = lambda net, floating: [t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point() == floating]
    torch._foreach_lerp_(pick(ema, True), pick(model, True), 1 - decay)
    for counter, value in zip(pick(ema, False), pick(model, False), strict=True):
        counter.copy_(value)


class FastNetwork(nn.Module):
    """model(x) up to rounding: in bf16, except for the classifier, if `bf16`; by torch.compile if `compiled`.

    Images (B, 3, H, W) in [0, 1] to logits (B, C) float32, or float64 if the model is. Parameters, buffers and modes
    are the model's own and must keep their place in memory. In eval mode the weights are those at its beginning, with
    BatchNorm folded into the convolutions. If x requires a gradient, this is an attack and the weights get none. A
    compiled network would compute theirs as well, so an attack calls one over the same memory with constant weights.
    """

    def __init__(self, model: nn.Module, bf16: bool = False, compiled: bool = False):
        super().__init__()
        self.model, self.bf16, self.compiled = model, bf16, compiled
        self.capture = compiled and next(model.parameters()).is_cuda
        check_conv_bn(model)
        without_bn, self.folds = folded(model)
        self.networks = {"update": model, "attack": frozen(model).train(), "eval": without_bn}
        self.compiled_calls, self.first_shape = {}, None

    def train(self, mode: bool = True) -> nn.Module:
        if not mode:
            fold(self.folds)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        use = "eval" if not self.training else "attack" if x.requires_grad else "update"
        self.first_shape = self.first_shape or x.shape
        if not self.compiled or x.shape != self.first_shape:  # compiling an epoch's last batch as well takes minutes
            return self.call(self.networks[use], x)
        key = use, x.requires_grad
        if key not in self.compiled_calls:
            torch._dynamo.config.recompile_limit = 64  # of a class of networks, with all its uses in all networks
            call = partial(self.call, torch.compile(self.networks[use], dynamic=False))  # its mode never changes
            if self.capture and key == ("eval", True):
                # Forward and backward as CUDA graphs: their hundreds of kernels are launched at once.
                call = torch.cuda.make_graphed_callables(call, (x.detach().clone().requires_grad_(),))
            self.compiled_calls[key] = call
        return self.compiled_calls[key](x).clone()  # a graph's next replay overwrites its logits

    def call(self, network, x):
        # Without autocast's cache: a weight is used once in a forward, and a graph must not depend on it.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            logits = network(x)  # (B, C)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def frozen(model: nn.Module) -> nn.Module:
    """The same network over the same memory, without gradients of the weights."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for own, shared in zip([*twin.parameters(), *twin.buffers()], [*model.parameters(), *model.buffers()], strict=True):
        own.data = shared.data
    return twin


def folded(model: nn.Module) -> tuple[nn.Module, list]:
    """A frozen network in eval mode, without the BatchNorms that alone read a convolution's output (`conv_bn` in
    models.py). And a list for `fold`: each such convolution of it, the same of `model`, and its BatchNorm."""
    twin, folds, modules = frozen(model).eval(), [], dict(model.named_modules())
    for name, block in modules.items():
        for pair in getattr(block, "conv_bn", ()):
            conv, bn = (f"{name}.{part}".lstrip(".") for part in pair)
            if conv in modules:  # some shortcuts are the identity
                target, weight = twin.get_submodule(conv), modules[conv].weight
                target.weight = nn.Parameter(torch.empty_like(weight), requires_grad=False)
                target.bias = nn.Parameter(weight.new_empty(len(weight)), requires_grad=False)
                twin.set_submodule(bn, nn.Identity())
                folds.append((target, modules[conv], modules[bn]))
    return twin, folds


@torch.no_grad()
def check_conv_bn(model: nn.Module) -> None:
    """Raises ValueError if folding the pairs of `conv_bn` changes the network: if a BatchNorm reads anything else than
    its convolution's output, or that convolution has a bias. Compares a copy with random statistics on two images."""
    twin = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    for values in twin.state_dict().values():
        if values.dim() == 1:  # BatchNorm's: a new one is the identity, whatever it reads
            values.copy_(0.5 + torch.rand(len(values), generator=generator))
    without_bn, folds = folded(twin)
    if not folds or next(model.parameters()).is_meta:
        return
    fold(folds)
    x = torch.rand(2, 3, 32, 32, generator=generator).to(next(model.parameters()))
    expected, found = twin(x), without_bn(x)  # (2, C)
    if (found - expected).abs().max() > 1e-2 * expected.abs().max():
        raise ValueError(f"conv_bn of {type(model).__name__} names a BatchNorm that cannot be folded: see models.py")


@torch.no_grad()
def fold(folds: list) -> None:
    """bn(conv(x)) = conv'(x) in eval mode, with s = bn.weight / sqrt(var + eps): w' = s w, b' = bn.bias - s mean."""
    for target, conv, bn in folds:
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        torch.mul(conv.weight, scale.view(-1, 1, 1, 1), out=target.weight)
        torch.sub(bn.bias, scale * bn.running_mean, out=target.bias)
