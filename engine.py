"""What surrounds a run's updates and is not the paper: several processes, the run's folder, signals.

torchrun starts the processes, each with its part of every batch on its own bare networks. A step needs to know nothing
of it: `global_gradient` adds up what the processes found before the optimizer uses it.
"""

import json
import math
import os
import signal
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # Windows, where a folder in use is not noticed
    fcntl = None

import checkpoints
from cli import PARTIAL, UserError, first_line, pick_device, write_text
from losses import sum_over_processes

# Several processes


@contextmanager
def processes(name):
    """This process's device, by default a GPU if there is one; under torchrun the processes know each other inside the
    `with` (gloo between CPUs, NCCL between GPUs), and only the first one is heard.

    Raises UserError where the device `name` cannot be used.
    """
    if "LOCAL_RANK" not in os.environ:  # not under torchrun
        yield pick_device(name)
        return
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda:"):
        raise UserError("under torchrun every process takes a GPU of its own: leave --device out, or say --device cuda")
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if name == "cuda" and here > torch.cuda.device_count():
        raise UserError(f"{here} processes, but only {torch.cuda.device_count()} GPUs: give torchrun fewer")
    device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if rank() > 0:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
        yield device


def rank():
    """The number of this process, 0 for the first or only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def count():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own(total):
    """The part of `total` images that is this process's: a slice. The parts' sizes differ by one at most."""
    return slice(total * rank() // count(), total * (rank() + 1) // count())


def check_batches(images, batch_size):
    """Raises UserError where an epoch has a batch, the last one, with fewer images than there are processes."""
    smallest = images % batch_size or min(images, batch_size)
    if smallest < count():
        raise UserError(f"a batch of {smallest} images for {count()} processes: choose another --batch-size")


def agree(function, turn=True):
    """`function()` on the processes whose `turn` it is, None on the others; a mistake on one of them is raised on all,
    so that none waits for another in vain."""
    if count() == 1:
        return function()
    result, mistake = None, None
    try:
        result = function() if turn else None
    except (UserError, OSError) as error:
        mistake = str(error)
    mistakes = [None] * count()
    dist.all_gather_object(mistakes, mistake)
    for mistake in filter(None, mistakes):
        raise UserError(mistake)
    return result


def from_first(function):
    """What `function()` gives on the first process, on all of them."""
    result = [agree(function, rank() == 0)]
    if count() > 1:
        dist.broadcast_object_list(result, device=torch.device("cpu"))
    return result[0]


def one_by_one(function):
    """`function()` on every process, on each machine's first one before the others, which then find its downloads."""
    if count() == 1:
        return function()
    first = os.environ["LOCAL_RANK"] == "0"
    result = agree(function, first)
    others = agree(function, not first)
    return result if first else others


@contextmanager
def global_gradient(optimizer, share):
    """Inside the `with`, `optimizer.step()` takes the gradient of the mean over the whole batch: the processes'
    gradients, each the mean over its own `share` of the batch, times that share, added up. Alone, nothing changes."""
    if count() == 1:
        yield
        return

    def add_up(*_):
        gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        gradients = [gradient for gradient in gradients if gradient is not None]
        total = sum_over_processes(*(share * gradient for gradient in gradients))
        for gradient, summed in zip(gradients, total, strict=True):
            gradient.copy_(summed)

    hook = optimizer.register_step_pre_hook(add_up)
    try:
        yield
    finally:
        hook.remove()


def average_statistics(networks):
    """BatchNorm normalises with each process's own statistics, as under DataParallel in the releases; its running ones
    become their mean over the processes after every update, so that all keep the same networks."""
    if count() == 1:  # asked first: an update alone has no need to look for them
        return
    statistics = [b for model in networks.values() for b in model.buffers() if b.is_floating_point()]
    if not statistics:
        return
    for buffer, total in zip(statistics, sum_over_processes(*statistics), strict=True):
        buffer.copy_(total / count())


# Signals


class Stop:
    """Notes SIGINT (Ctrl-C) and SIGTERM inside the `with`, instead of dying of them in the middle of an update."""

    signal = 0

    def __enter__(self):
        self.former = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.signal = number
        if rank() == 0:
            os.write(2, b"\nfinishing this update, then saving\n")  # print might be in the middle of a line itself
        if count() == 1:  # a second signal acts at once; torchrun, though, sends the first one twice
            self.__exit__()

    def asked(self):
        """The signal that came, or 0; the same answer on all processes, which call this after the same update."""
        if count() > 1:
            came = torch.tensor(self.signal)
            dist.all_reduce(came, dist.ReduceOp.MAX)
            self.signal = int(came)
        return self.signal


# The run's folder


@contextmanager
def claimed(out, resuming):
    """The folder `out`, made if need be, is no other run's inside the `with`, which gets the checkpoint to go on from,
    or None. The system ends the claim with the process, however that dies. A folder made here that stays empty goes
    again.

    Raises UserError where the folder is there and the run is not `resuming`, or another one is at work in it.
    """
    if out.exists() and not resuming:
        raise UserError(f"{out} exists already: go on with --resume, or choose another folder with --out")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{out} cannot be made ({error.strerror}): choose another folder with --out") from None
        if fcntl:
            handle = os.open(out, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is at work in {out}: wait for it, or choose another --out") from None
            except OSError:
                print(f"note: the file system of {out} has no locks, so a second run in it would not be noticed")
        for unfinished in out.glob(f".*{PARTIAL}"):  # what a killed run was writing
            unfinished.unlink()
        if (out / "last.pt").exists():
            yield load(out / "last.pt")
        else:
            check_unused(out)
            yield None


def check_unused(out):
    """Raises UserError where a run that starts in `out` would overwrite a file which is not that of a run that ended
    before its first save."""
    names = ["log.jsonl", "weights.pt"]
    with suppress(FileNotFoundError):
        if '"settings"' not in (out / "config.json").read_text(encoding="utf-8", errors="replace"):
            names.append("config.json")
    for name in names:
        if (out / name).exists():
            raise UserError(f"{out / name} is there, but no last.pt to go on from: choose another folder with --out")


def _remove_empty(folders):
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def state(networks, averaged, optimizer):
    """What the updates have changed, for a checkpoint."""
    content = {role: model.state_dict() for role, model in networks.items()}
    if averaged is not None:
        content["ema"] = averaged.module.state_dict()
    return {**content, "optimizer": optimizer.state_dict()}


def restore(former, networks, averaged, optimizer):
    """Puts networks, average and optimizer into the state that the checkpoint `former` holds. Raises UserError where it
    is of others."""
    roles = [*networks, *([] if averaged is None else ["ema"])]
    if missing := checkpoints.lacking(former, dict.fromkeys(roles, dict)):
        raise UserError(f"the checkpoint has no {', '.join(missing)}")
    for role, model in networks.items():
        checkpoints.load_weights(model, former[role], f"the checkpoint's {role}")
    try:
        optimizer.load_state_dict(former["optimizer"])
        for weight, own in optimizer.state.items():
            if own.get("momentum_buffer") is not None and own["momentum_buffer"].shape != weight.shape:
                raise ValueError("a momentum has another shape than its weight")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the checkpoint's optimizer is of other networks: {first_line(error)}") from None
    if averaged is not None:
        checkpoints.load_weights(averaged.module, former["ema"], "the checkpoint's average")
        averaged.n_averaged.fill_(1)  # any number but 0, at which the average would start anew


def save(out, content, best):
    """Replaces `last.pt`, if it is the best so far `best.pt` before it, and `log.jsonl` after it: each whole or not at
    all. The checkpoint holds the log as well, so that a run which dies in between mends the file when it goes on."""
    if best:
        checkpoints.save(out / "best.pt", content)
    checkpoints.save(out / "last.pt", content)
    write_log(out, content["log"])


def write_log(out, log):
    """`log` as log.jsonl, an object per epoch."""
    write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))


def load(path):
    """The checkpoint of a run. Raises UserError where it is none."""
    former = checkpoints.load(path)
    kinds = {"target": dict, "optimizer": dict, "epoch": int, "step": int, "totals": dict, "seconds": float,
             "settings": dict, "classes": list, "log": list}  # fmt: skip
    missing = checkpoints.lacking(former, kinds)
    if not missing:
        parts = {"log": (former["log"], dict), "totals": (former["totals"].values(), torch.Tensor)}
        missing = [name for name, (found, kind) in parts.items() if not all(isinstance(x, kind) for x in found)]
    if missing:
        raise UserError(f"{path} is not a run's checkpoint: it has no {', '.join(missing)}")
    return former


def check_finite(bad, networks, epoch, step):
    """Raises UserError where the loss or a weight is not finite, so that nothing which comes of it is ever saved.

    bad (), on the device, the first update of the epoch whose loss was not finite, or infinity; `step` the last one.
    """
    if count() > 1:
        dist.all_reduce(bad, dist.ReduceOp.MIN)
    if bad < math.inf:
        what = f"the loss is not finite in update {int(bad)} of epoch {epoch}"
    elif not all(bool(weight.isfinite().all()) for model in networks.values() for weight in model.parameters()):
        what = f"a weight is not finite after update {step} of epoch {epoch}"
    else:
        return
    raise UserError(f"{what}: nothing since the last save is kept; try a smaller --lr, or --precision fp32")
