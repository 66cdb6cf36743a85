"""How fast an update is, how much memory it takes and where its time goes, beside what the method's release does.

    python benchmarks/step.py --target resnet18 --method dynat-inner --json step.json
    python benchmarks/step.py --target resnet18 --parts                                time by part
    python benchmarks/step.py --target resnet18 --sweep steps 1 5 10 20                how it grows with the steps
    python benchmarks/step.py --batch-size 32 --sweep target wrn16-1 wrn16-2 wrn16-4   and with the width

Takes the flags of train_dynat.py that change an update (--method, --target, --guide, --batch-size, --steps ...). What
is measured and how stands in benchmarks/README.md.
"""

import json
import shlex
import sys
import time
import weakref
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402  (the scripts are in the folder above)
import train_dynat  # noqa: E402
from benchmarks import release  # noqa: E402
from cli import (  # noqa: E402
    Parser,
    UserError,
    bounded,
    command,
    deterministic,
    full_float32,
    pick_device,
    provenance,
    write_text,
)
from data import Images, generator, load_images, pixels, subset, train_batches  # noqa: E402
from engine import Stop  # noqa: E402
from evaluate import robust  # noqa: E402
from speed import Fast, tf32  # noqa: E402

CLASSES = {"cifar100": 100}
SWEPT = ("steps", "batch-size", "target", "guide", "method")
NOT_OF_AN_UPDATE = ("out", "resume", "ema", "val_images", "eval_every", "sync_bn")


def arguments(settings):
    """What a method's step takes besides networks, optimizer and batch, in the run's last epoch, when its perturbation
    and weights, if any, have begun."""
    method = train_dynat.METHODS[settings["method"]]
    chosen = {name: settings[name] for name in train_dynat.options(method) if name != "guide"}
    if "epoch" in signature(method["step"]).parameters:
        chosen["epoch"] = settings["epochs"]
    return chosen


def our_epoch(settings, images, device):
    """A function that makes one pass over the images in train_dynat's own loop, and the networks it trains."""
    epoch = settings["epochs"]
    networks, optimizer = train_dynat.prepare_networks(settings, len(images.classes), device)
    optimizer.param_groups[0]["lr"] = train_dynat.learning_rate(settings, epoch)
    fast = {role: Fast(model, settings["precision"] == "bf16", settings["compile"]) for role, model in networks.items()}
    bar, stop = tqdm(disable=True), Stop()

    def run():
        with tf32(settings["precision"] == "tf32"):
            train_dynat.train_epoch(
                fast, None, optimizer, images, settings, epoch, {"step": 0, "totals": {}}, bar, stop
            )

    return run, fast


def release_epoch(settings, images, device):
    """A function that makes one pass over the images as the method's release does, NCHW, float32, fed by the host."""
    method = train_dynat.METHODS[settings["method"]]
    one_update, chosen = release.RELEASES[settings["method"]], arguments(settings)
    roles = [role for role in ("target", "guide") if role in settings]
    networks = {role: models.build_model(settings[role], len(images.classes)).to(device) for role in roles}
    if "proxy" in signature(one_update).parameters:
        chosen["proxy"] = models.build_model(settings["target"], len(images.classes)).to(device)
    weights = [weight for model in networks.values() for weight in model.parameters()]
    hyper = {"momentum": settings["momentum"], "weight_decay": settings["weight_decay"]}
    optimizer = torch.optim.SGD(weights, lr=train_dynat.learning_rate(settings, settings["epochs"]), **hyper)
    uniform = partial(release.uniform_start, epsilon=settings["epsilon"])
    start = release.near_start if method["start"] == "near" else uniform
    batches = release.loader(images, settings["batch_size"], device)

    # The releases' ResNets activate into new memory, their WRN in place.
    activation = F.relu if settings["target"].startswith("resnet") else models.relu

    def run():
        with mock.patch.object(models, "relu", activation):
            for x, y in batches:
                x, y = x.to(device), y.to(device)
                one_update(**networks, optimizer=optimizer, x=x, y=y, start=start(x), **chosen)

    return run, networks


def seconds_of(run, device):
    """How long run() takes until the device has done it."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def matmul_rate(device, precision):
    """FLOP/s of the product of two square matrices, the best of ten: what the device can do for a network at most."""
    rows = 8192 if device.type == "cuda" else 2048  # large enough for the best rate
    a, b = torch.randn(2, rows, rows, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    with tf32(precision == "tf32"):
        return 2 * rows**3 / min(seconds_of(lambda: a @ b, device) for _ in range(10))


class Count(TorchDispatchMode):
    """What torch does inside its `with`, forward and backward.

    flop   floating-point operations of convolutions and matrix products, a multiply-add as two. torch's FlopCounterMode
           has the formulas, but refuses `autograd.grad` on images.
    peak   the most bytes held at once by tensors made inside, without what an operation needs while it runs.
    """

    def __init__(self):
        super().__init__()
        self.flop, self.peak, self.held, self.storages = 0, 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function._overloadpacket in flop_registry:
            self.flop += flop_registry[function._overloadpacket](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage):
        place, size = storage._cdata, storage.nbytes()
        if place not in self.storages:

            def freed(_):
                self.held -= size
                del self.storages[place]

            self.storages[place] = weakref.ref(storage, freed)
            self.held += size
            self.peak = max(self.peak, self.held)


def cuda_peak(run, device):
    """The most bytes that torch held on the GPU at once during run(), on top of those before it."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def graph_bytes(model, x):
    """What autograd keeps of model(x) until its backward: each storage once, without the weights and x."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(x)  # holds the graph, so that no storage is freed and its place taken by another
    del logits
    return sum(size for place, size in kept.items() if place not in known)


def side(epoch_of, settings, images, device):
    """One side of the comparison, warm: its pass over the images, and what is counted rather than timed."""
    batch = images._replace(x=images.x[: settings["batch_size"]], y=images.y[: settings["batch_size"]])

    def two_updates(**changed):  # the second one beside the momentum that the first one made
        run, _ = epoch_of({**settings, **changed}, batch, device)
        run()
        run()

    with Count() as count:
        two_updates(compile=False)  # whose operations are torch's own, each to be seen
    peak = cuda_peak(two_updates, device) if device.type == "cuda" else count.peak
    run, networks = epoch_of(settings, images, device)
    run()
    return run, networks, {"flop_per_update": count.flop // 2, "peak_bytes": peak}


def compare(settings, images, device, repeats, with_release):
    """The figures of one configuration: both sides in turn, `repeats` times, each a pass over the images."""
    updates = len(images.y) // settings["batch_size"]
    sides = {"ours": our_epoch}
    if with_release and settings["method"] in release.RELEASES:
        sides["release"] = release_epoch
    warm = {name: side(epoch_of, settings, images, device) for name, epoch_of in sides.items()}
    seconds, precision = {name: [] for name in sides}, {"ours": settings["precision"], "release": "fp32"}
    rates = dict.fromkeys(sides, 0.0)
    for _ in range(repeats):
        for name, (run, _, _) in warm.items():
            rates[name] = max(rates[name], matmul_rate(device, precision[name]))
            seconds[name].append(seconds_of(run, device) / updates)

    row = {name: settings[name] for name in ("method", "target", "guide", "batch_size", "steps") if name in settings}
    row |= {"precision": settings["precision"], "compile": settings["compile"]}
    for name, (_, _, counted) in warm.items():
        typical = median(seconds[name])
        row[name] = {
            "seconds_per_update": typical,
            "seconds_per_update_all": seconds[name],
            "images_per_second": settings["batch_size"] / typical,
            **counted,
            "flop_per_second": counted["flop_per_update"] / typical,
            "matmul_flop_per_second": rates[name],
            "share_of_matmul_rate": counted["flop_per_update"] / typical / rates[name],
        }
    if "release" in sides:
        ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["release"], strict=True)]
        row["speedup"], row["speedup_all"] = median(ratios), ratios
    x = pixels(images.x[: settings["batch_size"]])
    row["graph_bytes"] = {role: graph_bytes(model, x) for role, model in warm["ours"][1].items()}
    return row


@contextmanager
def timed_parts(step, networks, device, parts):
    """Inside the `with`, what the step's attack and the guide's forward take is added to `parts`, in seconds."""

    def timed(name, function):
        def with_time(*args, **kwargs):
            results = []
            taken = seconds_of(lambda: results.append(function(*args, **kwargs)), device)
            parts[name] = parts.get(name, 0.0) + taken
            return results[0]

        return with_time

    home = step.__globals__
    if "linf_pgd" not in home:  # GAIRAT's, which its hybrid shares
        home = home["geometry_pgd"].__globals__
    guide = networks.get("guide")
    with mock.patch.dict(home, linf_pgd=timed("attack", home["linf_pgd"])):
        if guide is None:
            yield
            return
        with mock.patch.object(guide, "forward", timed("guide", guide.forward)):
            yield


def by_part(settings, images, device, evaluated):
    """Seconds per update by part, of our side alone: batches, the guide's forward, the attack, and the rest of the
    update; the release's batches; and seconds of the evaluation of `evaluated`."""
    updates = len(images.y) // settings["batch_size"]
    run, networks = our_epoch(settings, images, device)
    run()
    parts = {}
    with timed_parts(train_dynat.METHODS[settings["method"]]["step"], networks, device, parts):
        total = seconds_of(run, device)
    batches = lambda: [None for _ in train_batches(images, settings["batch_size"], settings["seed"], epoch=1)]
    parts["data"] = seconds_of(batches, device)
    parts["update"] = total - sum(parts.values())
    loader = release.loader(images, settings["batch_size"], device)
    host = lambda: [x.to(device) for x, _ in loader]
    host()
    parts["release_data"] = seconds_of(host, device)
    row = {f"{name}_seconds": taken / updates for name, taken in parts.items()}

    budget = {"epsilon": 8 / 255, "step_size": 2 / 255, "batch_size": 256, "seed": 0}
    target = networks["target"].model  # in float32, as all evaluation
    row["evaluation"] = {
        "images": len(evaluated.y),
        "clean_seconds": seconds_of(lambda: robust(target, evaluated, "clean", **budget), device),
        "pgd20_seconds": seconds_of(lambda: robust(target, evaluated, "pgd20", **budget), device),
    }
    return row


def made_up(count, classes):
    """`count` images of CIFAR's shape, noise: what an update costs does not depend on what they show."""
    draws = generator("cpu", "benchmark", count)
    x = torch.randint(0, 256, (count, 3, 32, 32), generator=draws, dtype=torch.uint8)
    return Images(x, torch.arange(count) % classes, [f"class{label}" for label in range(classes)])


def images_for(settings, count, split, device, made):
    """`count` images on the device: made up, or of the run's data set."""
    if made:
        return made_up(count, CLASSES.get(settings["dataset"], 10)).to(device)
    return subset(load_images(settings["dataset"], split, settings["data_dir"]), count, settings["seed"]).to(device)


def parser():
    p = Parser(prog="benchmarks/step.py", description=__doc__, epilog="Any other flag is train_dynat.py's.")
    add = p.add_argument_group("measurement").add_argument
    add("--updates", type=bounded(int, 1), default=5, metavar="N",
        help="timed together, in each repetition (default: 5)")  # fmt: skip
    add("--repeats", type=bounded(int, 1), default=5, metavar="N",
        help="repetitions, ours and the release in turn; the median is reported (default: 5)")  # fmt: skip
    add("--no-release", action="store_true", help="ours alone (default: beside the release, where there is one)")
    add("--sweep", nargs="+", default=[], metavar=("FLAG", "VALUE"),
        help=f"one row per value of {', '.join(SWEPT)} (default: one row)")  # fmt: skip
    add("--parts", action="store_true", help="time by part as well, evaluation included (default: no)")
    add("--eval-images", type=bounded(int, 1), default=1000, metavar="N",
        help="images that --parts evaluates (default: 1000)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="keep all figures there, with command, commit and device")
    return p


def configurations(typed, sweep):
    """The settings of each row: those typed, and one after another the swept values in their place."""
    if not sweep:
        return [train_dynat.resolve(typed)[0]]
    flag, *values = sweep
    if flag not in SWEPT or not values:
        raise UserError(f"--sweep takes one of {', '.join(SWEPT)} and then its values, as in: --sweep steps 1 5 10")
    swept = [train_dynat.parser().parse_args([f"--{flag}", value]) for value in values]
    name = flag.replace("-", "_")
    return [train_dynat.resolve({**typed, name: getattr(one, name)})[0] for one in swept]


def report(row):
    """A row's figures, for people."""
    names = " ".join(str(row[name]) for name in ("method", "target", "guide") if name in row)
    lines = [f"{names}  batch {row['batch_size']}  steps {row['steps']}  {row['precision']}"
             f"{' compiled' if row['compile'] else ''}"]  # fmt: skip
    for name in ("ours", "release"):
        if name in row:
            found = row[name]
            lines.append(
                f"  {name:8} {found['seconds_per_update']:9.4f} s/update {found['images_per_second']:9.1f} images/s  "
                f"{found['flop_per_second'] / 1e9:10.1f} GFLOP/s ({found['share_of_matmul_rate']:.0%} of the "
                f"{found['matmul_flop_per_second'] / 1e9:.0f} of a matrix product)  "
                f"peak {found['peak_bytes'] / 2**20:8.1f} MiB"
            )
    if "speedup" in row:
        lines.append(
            f"  speed-up {row['speedup']:.2f} ({min(row['speedup_all']):.2f} to {max(row['speedup_all']):.2f})"
        )
    kept = [f"{role} {size / 2**20:.1f} MiB" for role, size in row["graph_bytes"].items()]
    lines.append(f"  kept for a backward: {', '.join(kept)}")
    if "parts" in row:
        found, evaluated = row["parts"], row["parts"]["evaluation"]
        names = [name for name in found if name.endswith("_seconds")]
        taken = [f"{name.removesuffix('_seconds')} {found[name]:.4f} s" for name in names]
        lines.append(f"  per update: {', '.join(taken)}")
        lines.append(
            f"  {evaluated['images']} images evaluated: clean {evaluated['clean_seconds']:.2f} s, "
            f"pgd20 {evaluated['pgd20_seconds']:.2f} s"
        )
    return "\n".join(lines)


@command
def main(argv):
    args, rest = parser().parse_known_args(argv)
    typed = {name: value for name, value in vars(train_dynat.parser().parse_args(rest)).items() if value is not None}
    for name in NOT_OF_AN_UPDATE:
        if name in typed:
            raise UserError(f"--{name.replace('_', '-')} changes no update: leave it out")
    device = pick_device(typed.pop("device", None))
    made = "dataset" not in typed
    everything = configurations(typed, args.sweep)
    full_float32()
    deterministic(everything[0]["deterministic"])
    origin = {"command": shlex.join(["python", "benchmarks/step.py", *argv]), **provenance(device)}
    content = {**origin, "updates": args.updates, "repeats": args.repeats, "rows": []}
    print(f"{origin['device']}, torch {origin['torch']}, commit {origin['commit']}")
    for settings in everything:
        images = images_for(settings, args.updates * settings["batch_size"], "train", device, made)
        row = compare(settings, images, device, args.repeats, not args.no_release)
        if args.parts:
            row["parts"] = by_part(
                settings, images, device, images_for(settings, args.eval_images, "test", device, made)
            )
        content["rows"].append(row)
        print(report(row), flush=True)
        if args.json:  # after each row, so that an interruption loses one
            write_text(args.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
