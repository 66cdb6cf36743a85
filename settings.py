"""The settings of a training run: the flags, their defaults, how a run's settings follow from both, and its name.

A method's own settings stand beside its step; `methods` is the registry of train_dynat.py, `flags` what `parse` gives.
A flag that is not typed is absent from `typed`: no default is in it.
Of this project it imports `cli`, `data` and `models`.
"""

from argparse import SUPPRESS, ArgumentTypeError, BooleanOptionalAction
from pathlib import Path

import torch

from cli import Parser, UserError, home_path, in_range, parse_fraction
from data import DATASETS
from models import NAMES, build_model

ATTACK = {  # the paper's; every step takes these
    "epsilon": 0.031,  # radius, in units of pixels in [0, 1]
    "step_size": 2 / 255,  # in the same units
    "steps": 10,
}
DEFAULTS = {  # of every run, unless its method or a flag says otherwise
    "method": "dynat",
    "dataset": "cifar10",
    "target": "wrn34-10",  # the paper's main row
    "preset": "paper",
    "epochs": None,  # the method's
    "data_dir": None,  # "data" for CIFAR
    "train_images": None,  # all that are not held out
    "val_images": 0,
    **ATTACK,
    "batch_size": 128,  # images in an update, of all processes together
    "lr": 0.1,  # before the factors of the schedule
    "schedule_epochs": None,  # the run's epochs
    "lr_milestones": None,  # the method's schedule
    "momentum": 0.9,
    "weight_decay": 2e-4,
    "ema": 0.0,  # decay per update; 0: no moving average
    "seed": 1,
    "deterministic": True,
    "precision": "fp32",
    "compile": False,
    "sync_bn": False,
    "eval_every": 1,  # epochs
    "keep_from": None,  # the epoch from which on networks are kept; None: never
}
TINY = {"target": "cnn", "guide": "cnn", "epochs": 10, "batch_size": 32}  # about a minute on two cores
WHERE = ("out", "resume", "device", "help")  # flags that say where to train, not what
UNNAMED = ("data_dir", "eval_every", "keep_from", "deterministic")  # no weights depend on them


def network_name(text):
    """An argparse type: the name of a network that exists."""
    try:
        with torch.device("meta"):
            build_model(text, 10)
    except ValueError as error:
        raise UserError(str(error)) from None
    return text


def absolute(folder):
    """An argparse type: the folder's absolute path."""
    return str(home_path(folder).resolve())


def make_parser(methods, description):
    """(the parser of all flags; {setting: its flag, an argparse action} in the order of --help)."""
    p = Parser(prog="train_dynat.py", description=description, add_help=False, argument_default=SUPPRESS)
    whole, count = in_range(int, 0), in_range(int, 1)
    number, fraction = in_range(parse_fraction, 0), in_range(parse_fraction, 0, 1)
    add = p.add_argument_group("what is trained, and where").add_argument
    add("-h", "--help", action="store_true", help="show the flags of --method and its defaults")
    add("--method", choices=methods, metavar="M", help=", ".join(methods))
    add("--dataset", choices=DATASETS, help="tiny is made up, no download")
    add("--target", type=network_name, metavar="NAME", help=NAMES)
    add("--preset", choices=("paper", "release"), help="whose settings, where the two differ")
    add("--epochs", type=count, metavar="N", help="number of epochs; the schedule is scaled to it")
    add("--out", type=Path, metavar="DIR", help="default: runs/<method>-<dataset>-<target>-s<seed>-<what differs>")
    add("--resume", action="store_true", help="continue --out, or start it; only --epochs and --data-dir may differ")
    add("--device", metavar="D", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add = p.add_argument_group("data").add_argument
    add("--data-dir", type=absolute, metavar="D", help="where CIFAR is or goes, or a folder with train/ and test/")
    add("--train-images", type=in_range(int, 2), metavar="N", help="train on a class-balanced subset")
    add("--val-images", type=whole, metavar="N", help="hold out N images, keep best.pt by PGD-10 on them")
    add = p.add_argument_group("method").add_argument
    add("--guide", type=network_name, metavar="NAME", help="a network, as --target")
    add("--static-labels", action="store_true", help="the ground truth in the place of the dynamic labels")
    add("--beta", type=number, help="weight of the target's loss, Eq. (6)")
    add("--kl-weight", type=number, metavar="W", help="weight of the KL term")
    add("--awp-gamma", type=number, metavar="G", help="size of the weight perturbation, relative to the weights")
    add("--awp-start", type=count, metavar="EPOCH", help="the first with perturbed weights")
    add("--burn-in", type=whole, metavar="N", help="epochs before instances are weighted")
    add("--label-smoothing", type=fraction, metavar="A", help="of the target's labels")
    add("--no-clean-forward", dest="clean_forward", action="store_false", help="keep clean images out of BatchNorm")
    add = p.add_argument_group("attack").add_argument
    add("--epsilon", type=fraction, help="radius in units of pixels in [0, 1], as 8/255")
    add("--step-size", type=fraction, help="of PGD, in the same units")
    add("--steps", type=in_range(int, 1, 1000), help="of PGD")
    add = p.add_argument_group("optimisation").add_argument
    add("--batch-size", type=count, help="of all processes together")
    add("--lr", type=number, help="learning rate before the schedule's factors")
    add("--schedule-epochs", type=count, metavar="N", help="scale the schedule to N epochs, not to --epochs")
    add("--lr-milestones", type=count, nargs="+", metavar="EPOCH", help="divide lr by 10 at each: the whole schedule")
    add("--momentum", type=fraction, help="of SGD")
    add("--weight-decay", type=number, help="of all weights")
    add("--ema", type=fraction, metavar="DECAY", help="keep a moving average of the target; 0: none")
    add = p.add_argument_group("run").add_argument
    add("--seed", type=whole, help="of networks, order, crops, flips and starts")
    add("--deterministic", action=BooleanOptionalAction,
        help="same seed, same device, same bytes (the default); --no-deterministic may be faster on a GPU")  # fmt: skip
    add("--precision", choices=("fp32", "tf32", "bf16"), help="of the networks, in training alone")
    add("--compile", action="store_true", help="torch.compile, and on a GPU CUDA graphs: slow to start, fast then")
    add("--sync-bn", action="store_true", help="under torchrun on GPUs: BatchNorm over the images of all processes")
    add("--eval-every", type=count, metavar="N", help="measure after each N epochs and the last")
    add("--keep-from", type=count, metavar="N", help="keep the networks of each epoch from N on")
    return p, {flag.dest: flag for flag in p._actions}  # argparse has no public list of them


def parse(argv, methods, description=""):
    """(the settings that `argv` types; the flags of WHERE, None where not typed; {setting: its flag}). --help prints
    the defaults and flags of the typed --method and ends the program."""
    parser, flags = make_parser(methods, description)
    typed = vars(parser.parse_args(argv))
    where = {name: typed.pop(name, None) for name in WHERE}
    if where["help"]:
        defaults = default_settings(typed, methods)
        for name, flag in flags.items():
            if name in defaults:
                flag.default = defaults[name]
            elif name not in WHERE:
                flag.help = SUPPRESS
        parser.print_help()
        raise SystemExit(0)
    return typed, where, flags


def default_settings(typed, methods):
    """The settings from which the `typed` ones differ: the defaults; then what the method says, in general and for
    this data set, target and preset; then those of `tiny`. Its schedule is scaled to the run's epochs."""
    tiny = TINY if typed.get("dataset") == "tiny" else {}
    chosen = {**DEFAULTS, **tiny, **typed}
    method = methods[chosen["method"]]
    settings = {**DEFAULTS, **method["step_settings"], **method["training"]}
    for name in ("dataset", "target", "preset"):
        settings |= method.get(f"for_{name}", {}).get(chosen[name], {})
    own_epochs = settings["epochs"]
    settings |= {name: value for name, value in tiny.items() if name in settings}  # some methods have no guide
    if chosen["dataset"].startswith("cifar"):
        settings["data_dir"] = "data"
    settings["schedule_epochs"] = typed.get("epochs", settings["epochs"])
    scale_schedule(settings, typed.get("schedule_epochs", settings["schedule_epochs"]), own_epochs)
    return settings


def scale_schedule(settings, epochs, own_epochs):
    """Moves the schedule of a method's own epochs to a run of `epochs`, in place: an epoch e > 1 becomes
    1 + (e - 1) * epochs / own_epochs, rounded, at least 2. So one epoch trains at the schedule's first rate."""

    def moved(epoch):
        return epoch if epoch <= 1 else max(2, round(1 + (epoch - 1) * epochs / own_epochs))

    for name in {"milestones", "tau_milestones"} & settings.keys():
        settings[name] = [(moved(first), value) for first, value in settings[name]]
    for name in {"awp_start", "easy_until", "hardest_from"} & settings.keys():
        settings[name] = moved(settings[name])
    if "burn_in" in settings:
        first_weighted = settings["burn_in"] + 1
        settings["burn_in"] = moved(first_weighted) - 1


def over_defaults(typed, methods):
    """Every setting of a run: the defaults, and over them what is typed."""
    settings = {**default_settings(typed, methods), **typed}
    if settings["data_dir"] is not None:
        settings["data_dir"] = absolute(settings["data_dir"])
    if settings["lr_milestones"] is not None:
        starts = [1, *sorted(settings["lr_milestones"])]
        settings["milestones"] = [(epoch, 10.0**-drops) for drops, epoch in enumerate(starts)]
    return settings


def learning_rate(settings, epoch):
    """lr times the factor of the last milestone that `epoch` has reached."""
    return settings["lr"] * [factor for first, factor in settings["milestones"] if first <= epoch][-1]


def check_used(typed, used, method, flags):
    """Raises UserError if a flag is typed that the method has no use for."""
    for name in typed:
        if name not in used:
            raise UserError(f"--method {method} does not use {flags[name].option_strings[-1]}: leave it out")


def resolve(typed, methods, flags):
    """Every setting of a new run. Raises UserError for a flag that changes nothing with this method or another flag."""
    settings = over_defaults(typed, methods)
    name = settings["method"]
    check_used(typed, default_settings(typed, methods), name, flags)
    if settings["preset"] == "release" and "for_preset" not in methods[name]:
        raise UserError(f"--preset release changes nothing of --method {name}: leave it out")
    also_scaled = {"tau_milestones", "awp_start", "easy_until", "burn_in"} & settings.keys()
    if typed.keys() >= {"lr_milestones", "schedule_epochs"} and not also_scaled:
        raise UserError("--lr-milestones is the whole schedule: leave --schedule-epochs out")
    return settings


def skipped_rates(settings, methods):
    """The learning rates of the method's own schedule at which no epoch of this run trains, since it has so few."""
    own = default_settings({name: settings[name] for name in ("method", "target")}, methods)
    rates = [settings["lr"] * factor for first, factor in own["milestones"] if first <= own["epochs"]]
    trained = {learning_rate(settings, epoch) for epoch in range(1, settings["epochs"] + 1)}
    return [rate for rate in rates if rate not in trained]


def run_name(typed, methods, flags):
    """What a run is called: method, data set, target and seed, then what else differs from the defaults."""
    defaults = default_settings(typed, methods)
    settings = {**defaults, **typed}
    words = [settings["method"], settings["dataset"], settings["target"], f"s{settings['seed']}"]
    for name, flag in flags.items():
        if name not in typed or name in ("method", "dataset", "target", "seed", *UNNAMED):
            continue
        if typed[name] == defaults.get(name):
            continue
        words.append(flag.option_strings[-1].removeprefix("--"))
        values = typed[name] if isinstance(typed[name], list) else [typed[name]]
        words += [value if isinstance(value, str) else f"{value:g}" for value in values if not isinstance(value, bool)]
    return "-".join(words)


def can_give(flag, value):
    """Whether the command line can give a setting this value by its `flag`."""
    if flag.choices is not None:
        return value in list(flag.choices)  # not in the dict itself: a list cannot be looked up there
    if flag.type is None:  # a switch
        return isinstance(value, bool)
    values = value if flag.nargs == "+" else [value]
    try:
        return [flag.type(str(each)) for each in values] == values
    except (ArgumentTypeError, UserError, TypeError):
        return False


def check_saved(saved, methods, flags, path):
    """Raises UserError unless `saved`, the settings in the checkpoint `path`, are such as this command line gives."""
    given_by = flags.keys() - {*WHERE, "data_dir"}  # images may have moved
    typed = {name: value for name, value in saved.items() if name in given_by and value is not None}
    wrong = {name for name, value in typed.items() if not can_give(flags[name], value)}
    if not wrong:
        given = over_defaults(typed, methods)
        wrong = saved.keys() ^ default_settings(typed, methods).keys()
        wrong |= {name for name in saved if name != "data_dir" and saved[name] != given.get(name)}
    if wrong:
        names = ", ".join(sorted(map(str, wrong)))
        raise UserError(f"{path} has no {names} that this version of the program can use")


def resumed_settings(typed, checkpoint, run_dir, methods, flags):
    """The settings of the run in `run_dir`, continued by the flags in `typed`. Another --epochs leaves the schedule as
    it is. Raises UserError for any other flag that differs, for epochs that are past, and for settings that the command
    line of this version cannot give."""
    saved = checkpoint["settings"]
    check_saved(saved, methods, flags, run_dir / "last.pt")
    check_used(typed, saved, saved["method"], flags)
    for name, value in typed.items():
        if name not in ("epochs", "data_dir") and value != saved[name]:
            word = name.replace("_", " ")
            raise UserError(f"the {word} of the run in {run_dir} was {saved[name]}, is {value}: leave that flag out")
    settings = {**saved, **typed}
    if settings["epochs"] < checkpoint["epoch"]:
        raise UserError(f"the run in {run_dir} has {checkpoint['epoch']} epochs already: give more --epochs")
    return settings
