"""Pictures and tables of what was measured, from run directories and from evaluate.py's JSON.

    python figures.py convergence runs/dynat-... runs/lbgat-... --out convergence.png       the paper's Fig. 3
    python figures.py clean runs/dynat-... runs/trades-... --out clean.pdf                  its Fig. 4
    python figures.py bars dynat.json trades.json --out bars.svg                            its Fig. 5
    python figures.py weak-to-strong runs/dynat-... --out labels.png                        its Sec. 3.3
    python figures.py overfitting runs/dynat-... runs/pgd-at-... --out overfitting.png      runs with --val-images
    python figures.py images runs/dynat-.../last.pt --out images.png                        what the attack does
    python figures.py table dynat.json trades.json                                          beside its Tables 1 to 4

Every share of N images carries N and its 95 % interval (Wilson). Nothing is smoothed, bars begin at zero.
"""

import json
import math
import re
import sys
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cli import Parser, UserError, bounded, command, number, write_text, written_whole
from data import DATASETS, pixels
from evaluate import attack_batch, load_checkpoint, load_network, load_test_images, wilson

# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow that print loses.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
HATCHES = ("", "///", "...", "\\\\\\", "xx")
RIGHT, WRONG = COLOURS[0], COLOURS[1]
WIDTH = 7.0  # inches: a text column, so that text keeps its size in print
LETTERS = 78  # that fit on a line of this width
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "dynat",  # same numbers, same bytes
    "savefig.dpi": 300,
}
UNDATED = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}  # no time in the file, by suffix

# The paper's Tables 1 to 4, in percent, as printed; "-" where a table has no such column. Methods and networks as this
# project names them: Table 1's DYNAT-AWP (lambda = 0) is `dynat-awp:0`. AA is very probably measured on
# the first 1,000 test images at 0.031, as in the authors' release.
PAPER = """
table  dataset   network   method              clean  pgd10  pgd20  pgd50  pgd100   apgd     cw     aa    all
1      cifar10   wrn34-10  pgd-at              85.17  56.07  55.08  54.88       -      -  53.91  51.69  54.32
1      cifar10   wrn34-10  trades              85.72  56.75   56.1   55.9       -      -  53.87  53.40  55.21
1      cifar10   wrn34-10  mart                84.17  58.98  58.56  58.06       -      -  54.58  51.10  56.25
1      cifar10   wrn34-10  fat                 87.97  50.31  49.86  48.79       -      -  48.65  47.48  49.02
1      cifar10   wrn34-10  gairat              86.30  60.64  59.54  58.74       -      -  45.57  40.30  52.95
1      cifar10   wrn34-10  at-awp              85.57  58.92  58.13  57.92       -      -  56.03  53.90  56.98
1      cifar10   wrn34-10  lbgat               88.22  56.25  54.66   54.3       -      -  54.29  52.20  54.34
1      cifar10   wrn34-10  dynat               89.16  52.88  51.78  51.49       -      -  50.88  49.20  51.25
1      cifar10   wrn34-10  dynat-awp:0         90.27  55.49  54.49  54.30       -      -  53.28  52.10  53.93
1      cifar10   wrn34-10  dynat-awp           88.41  58.39  57.71  57.53       -      -  55.48  54.10  56.64
1      cifar10   wrn34-10  dynat-inner-awp     86.21  59.08  58.22  58.02       -      -  56.24  55.30  57.37
2      cifar100  wrn34-10  pgd-at              60.89  32.19  31.69  31.45       -      -   30.1  27.86      -
2      cifar100  wrn34-10  trades              58.61  29.20  28.66  28.56       -      -  27.05  25.94      -
2      cifar100  wrn34-10  sat                 62.82   28.1  27.17  26.76       -      -  27.32  24.57      -
2      cifar100  wrn34-10  at-awp              60.38  34.13  33.86  33.65       -      -  31.12  28.86      -
2      cifar100  wrn34-10  lbgat               60.64  35.13  34.75  34.62       -      -  30.65  29.33      -
2      cifar100  wrn34-10  dynat               67.25  28.03  26.97  26.81       -      -  26.62  24.10      -
2      cifar100  wrn34-10  dynat-awp           62.29  35.45  35.09  34.92       -      -  31.50  30.20      -
2      cifar100  wrn34-10  dynat-inner-awp     58.87  35.61  35.09  35.05       -      -  32.10  29.70      -
3      cifar10   wrn34-10  gairat              86.30      -  59.54      -       -      -  45.57  40.30      -
3      cifar10   wrn34-10  dynat-inner-gairat  87.25      -  60.20      -       -      -  45.78  42.60      -
3      cifar10   resnet18  gairat              82.27      -  60.07      -       -      -  37.82  35.70      -
3      cifar10   resnet18  dynat-inner-gairat  82.32      -  62.30      -       -      -  38.73  37.90      -
4      cifar10   resnet18  pgd-at              84.86      -      -      -   48.91  47.70  51.61  44.90      -
4      cifar10   resnet18  trades              84.00      -      -      -   52.66  52.37  52.30  48.10      -
4      cifar10   resnet18  mart                82.28      -      -      -   53.50  52.73  51.59  48.40      -
4      cifar10   resnet18  fat                 87.97      -      -      -   46.78  46.68  49.92  43.90      -
4      cifar10   resnet18  at-awp              85.17      -      -      -   52.63  50.40  51.39  47.00      -
4      cifar10   resnet18  gairat              83.22      -      -      -   54.81  50.95  39.86  33.35      -
4      cifar10   resnet18  mail                84.52      -      -      -   55.25  53.20  48.88  44.22      -
4      cifar10   resnet18  mail-mse            82.99      -      -      -   51.88  51.10  52.31  48.90      -
4      cifar10   resnet18  dynat-mail          83.71      -      -      -   52.49  52.40  52.13  49.00      -
4      cifar10   resnet18  dynat-inner-mail    82.30      -      -      -   53.02  52.80  52.57  49.90      -
"""
ALL = ("pgd10", "pgd20", "pgd50", "cw", "aa")  # the attacks whose mean is Table 1's column "All"


class Run(NamedTuple):
    """A run directory: its folder, settings, log (one dict per epoch) and images per split, where it says so."""

    source: Path
    settings: dict
    log: list
    images: dict


class Evaluation(NamedTuple):
    """One network of an evaluation JSON: the file, the run's settings, its role there, and the rows by attack."""

    source: Path
    settings: dict
    role: str
    rows: dict


def paper_rows():
    """The paper's figures: one dict per row of its tables, strings as printed, without the columns a table lacks."""
    header, *lines = (line.split() for line in PAPER.strip().splitlines())
    return [{name: value for name, value in zip(header, line, strict=True) if value != "-"} for line in lines]


def read_json(path):
    """The value in a JSON file, or the list of values, one a line, in a .jsonl file. UserError where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not whole JSON") from None


def field(record, name, source, kind=object):
    """record[name], or UserError where it is not there or not of this kind: `source` is no file of the expected one."""
    if not isinstance(record, dict) or not isinstance(record.get(name), kind) or name not in record:
        raise UserError(f"{source} has no '{name}'")
    return record[name]


def read_run(folder):
    """The run in a directory that train_dynat.py wrote. Raises UserError where it is missing, damaged or without an
    epoch."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no run directory")
    config, log = read_json(folder / "config.json"), read_json(folder / "log.jsonl")
    if not log:
        raise UserError(f"{folder} has no finished epoch yet")
    for row in log:
        field(row, "epoch", folder / "log.jsonl", int)
        for name in row:
            field(row, name, f"a row of {folder / 'log.jsonl'}", (int, float))
    return Run(folder, field(config, "settings", folder / "config.json", dict), log, config.get("images", {}))


def read_evaluations(path):
    """The networks in a JSON file that evaluate.py wrote. Raises UserError where it is missing, damaged or empty."""
    report = read_json(path)
    settings = field(field(report, "trained", path), "settings", path, dict)
    networks = {}
    for row in field(report, "results", path, list):
        for name in ("network", "name", "attack"):
            field(row, name, f"a row of {path}", str)
        for name, kind in {"n": int, "accuracy": (int, float), "interval": list}.items():
            field(row, name, f"a row of {path}", kind)
        networks.setdefault(row["network"], {})[row["attack"]] = row
    if not networks:
        raise UserError(f"{path} has no results")
    return [Evaluation(path, settings, role, rows) for role, rows in networks.items()]


def method_name(method):
    """A --method as the paper spells it: dynat-inner-awp is DYNAT-Inner-AWP."""
    return method.upper().replace("INNER", "Inner")


def attack_name(attack):
    """An attack as the paper spells it: pgd20 is PGD-20."""
    known = {"clean": "Clean", "cw": "C&W", "aa-fast": "AA-fast", "all": "All"}
    return known.get(attack) or re.sub(r"^PGD", "PGD-", attack.upper())


def attack_order(attack):
    """A sort key that puts attacks in the paper's order: clean, FGSM, PGD by steps, APGD, C&W, AA, All."""
    kind = attack.rstrip("0123456789")
    kinds = ("clean", "fgsm", "pgd", "apgd", "cw", "aa-fast", "aa", "all")
    return kinds.index(kind) if kind in kinds else len(kinds), len(attack), attack


def pixel_units(epsilon):
    """A radius as people write it: 8/255 where it is a whole number of pixel values, 0.031 otherwise."""
    steps = round(epsilon * 255)
    return f"{steps}/255" if abs(steps - epsilon * 255) < 1e-6 else f"{epsilon:g}"


def names(items, typed):
    """What to call each run or evaluation: as `typed`, one name per file, or by the method and by what sets it apart.

    That is every setting that differs among those of the same method, and a data set or target that is not common to
    all. Raises UserError where two have the same name.
    """
    sources = list(dict.fromkeys(item.source for item in items))
    if typed and len(typed) != len(sources):
        raise UserError(f"--labels gives {len(typed)} names to {len(sources)} files")
    found = []
    for item in items:
        if typed:
            name = typed[sources.index(item.source)]
        elif "method" in item.settings:
            name = ", ".join([method_name(item.settings["method"]), *_differences(item, items)])
        else:
            name = item.source.stem
        found.append(name if getattr(item, "role", "target") == "target" else f"{name}, {item.role}")
    for name in found:
        if found.count(name) > 1:
            raise UserError(f"{found.count(name)} of them are called '{name}': name them apart with --labels A B ...")
    return found


# Settings that follow from others, or change no figure.
UNTOLD = ("method", "milestones", "data_dir", "eval_every", "deterministic")


def _differences(item, items):
    for name, value in item.settings.items():
        peers = [other.settings for other in items if other.settings.get("method") == item.settings["method"]]
        if name in ("dataset", "target"):
            peers = [other.settings for other in items]
        if name not in UNTOLD and any(peer.get(name) != value for peer in peers):
            yield (
                f"{name.replace('_', ' ')} {value:g}"
                if isinstance(value, float)
                else f"{name.replace('_', ' ')} {value}"
            )


def curve(run, name):
    """The epochs whose log has the figure `name`, and its values in percent. Raises UserError where none has it."""
    points = [(row["epoch"], 100 * row[name]) for row in run.log if name in row]
    if not points:
        hint = ": train with --val-images" if name.startswith("val_") else ""
        raise UserError(f"the log of {run.source} has no {name}{hint}")
    return tuple(zip(*points, strict=True))


def images_behind(run, name):
    """How many images an accuracy of the log was measured on; None where the run does not say, and for the training
    batches, whose accuracy is a mean over an epoch in which the weights move."""
    split = "val" if name.startswith("val_") else "test" if name.endswith("test_acc") else "none"
    return run.images.get(split)


def interval(percent, n):
    """The 95 % confidence interval of an accuracy of n images, all in percent."""
    low, high = wilson(round(percent * n / 100), n)
    return 100 * low, 100 * high


def spread(percent, n):
    """An accuracy in percent with its 95 % interval where n is known: '83.2 % [80.8, 85.4]'."""
    if n is None:
        return f"{percent:.1f} %"
    low, high = interval(percent, n)
    return f"{percent:.1f} % [{low:.1f}, {high:.1f}]"


def counted(numbers):
    """The counts as text, each once: '1,000 / 10,000'."""
    return " / ".join(f"{n:,}" for n in sorted(set(numbers)))


def plot(ax, run, name, i, label=None):
    """Draws one figure of a run's log over its epochs, the i-th curve of the panel, with a band for its interval."""
    epochs, percent = curve(run, name)
    colour, n = COLOURS[i % len(COLOURS)], images_behind(run, name)
    if n is not None:
        low, high = zip(*(interval(value, n) for value in percent), strict=True)
        ax.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.plot(
        epochs,
        percent,
        label=label,
        color=colour,
        linestyle=LINES[i % len(LINES)],
        marker=MARKERS[i % len(MARKERS)],
        markevery=max(1, len(epochs) // 12),
        markeredgecolor="white",
        markeredgewidth=0.5,
    )
    ax.set_xlabel("epoch")
    ax.set_ylabel("accuracy (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.label_outer()


def heading(items, text=""):
    """A picture's title: the data set and the target that the runs or evaluations share, then `text`."""
    shared = []
    for name, shown in (("dataset", "{}"), ("target", "target {}")):
        values = {item.settings.get(name) for item in items}
        if len(values) == 1 and None not in values:
            shared.append(shown.format(values.pop()))
    return fill(": ".join(filter(None, [", ".join(shared), text])), LETTERS)


def called(items, dataset):
    """The runs or evaluations with their data set called `dataset`, as for a folder of images; as they are if None."""
    return [item._replace(settings={**item.settings, "dataset": dataset}) if dataset else item for item in items]


def behind(runs, name):
    """', n = 1,000, 95 % intervals': the images behind an accuracy of the logs; empty where no run says."""
    numbers = {images_behind(run, name) for run in runs} - {None}
    return f", n = {counted(numbers)}, 95 % intervals" if numbers else ""


def legend(figure, ax, columns=1):
    """What the curves or bars of `ax` are, below the picture, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    labels = [fill(label, LETTERS // columns - 6) for label in labels]
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def convergence(runs, labels):
    """Fig. 3: the target's accuracy per epoch, on the training batches under attack and on clean test images."""
    figure = Figure(figsize=(WIDTH, 3.4 + 0.2 * len(runs)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        _, train = curve(run, "adv_acc")
        _, test = curve(run, "test_acc")
        last = spread(test[-1], images_behind(run, "test_acc"))
        plot(left, run, "adv_acc", i, f"{label}: last {train[-1]:.1f} % in training, {last} in test")
        plot(right, run, "test_acc", i)
    left.set_title("training batches under attack", loc="left")
    right.set_title(fill("clean test images" + behind(runs, "test_acc"), LETTERS // 2 - 8), loc="left")
    figure.suptitle(heading(runs))
    legend(figure, left)
    return figure


def clean(runs, labels):
    """Fig. 4: the target's accuracy on clean test images per epoch."""
    figure = Figure(figsize=(WIDTH, 3.6 + 0.2 * len(runs)), layout="constrained")
    ax = figure.subplots()
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        _, percent = curve(run, "test_acc")
        plot(ax, run, "test_acc", i, f"{label}: last {spread(percent[-1], images_behind(run, 'test_acc'))}")
    figure.suptitle(heading(runs, "clean test images" + behind(runs, "test_acc")))
    legend(figure, ax)
    return figure


def weak_to_strong(runs, labels):
    """Sec. 3.3: dynamic labels grow from weak to strong, and the guide and the target with them. One panel per run."""
    columns = min(len(runs), 3)
    lines = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(WIDTH, 1.4 + 2.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    curves = {
        "label_acc": "dynamic labels that are right, training batches",
        "guide_test_acc": "guide, clean test images",
        "test_acc": "target, clean test images",
    }
    for ax, run, label in zip(panels.flat, runs, labels, strict=False):
        for i, (name, meaning) in enumerate(curves.items()):
            plot(ax, run, name, i, meaning)
        ax.set_title(fill(label, LETTERS // columns - 2), loc="left")
    for ax in panels.flat[len(runs) :]:
        ax.remove()
    figure.suptitle(heading(runs, "from weak to strong" + behind(runs, "test_acc")))
    legend(figure, panels[0, 0])
    return figure


def overfitting(runs, labels):
    """Robust overfitting (Rice et al., 2020): accuracy under PGD-10 on held-out training images, from its best epoch,
    a star, to the last. The thin line at the end is what was lost; the best of many noisy values is itself a little
    high."""
    figure = Figure(figsize=(WIDTH, 3.6 + 0.2 * len(runs)), layout="constrained")
    ax = figure.subplots()
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        epochs, percent = curve(run, "val_pgd")
        n, best, last = images_behind(run, "val_pgd"), max(percent), percent[-1]
        at = epochs[percent.index(best)]
        plot(ax, run, "val_pgd", i, f"{label}: best {spread(best, n)} in epoch {at}, last {spread(last, n)}")
        colour = COLOURS[i % len(COLOURS)]
        ax.plot([at, epochs[-1], epochs[-1]], [best, best, last], color=colour, linewidth=0.8)
        ax.plot(at, best, "*", color=colour, markersize=15, markeredgecolor="white", zorder=3)
    figure.suptitle(heading(runs, "held-out training images under PGD-10" + behind(runs, "val_pgd")))
    legend(figure, ax)
    return figure


def bars(evaluations, labels):
    """Fig. 5: accuracy per attack, one bar per network, with 95 % intervals; n and epsilon stand under each attack.

    Raises UserError where two networks met the same attack with another epsilon or step size: those do not compare.
    """
    attacks = sorted({attack for evaluation in evaluations for attack in evaluation.rows}, key=attack_order)
    figure = Figure(figsize=(WIDTH, 3.6 + 0.1 * len(evaluations)), layout="constrained")
    ax = figure.subplots()
    width = 0.84 / len(evaluations)
    for i, (evaluation, label) in enumerate(zip(evaluations, labels, strict=True)):
        measured = [attack for attack in attacks if attack in evaluation.rows]
        rows = [evaluation.rows[attack] for attack in measured]
        heights = [100 * row["accuracy"] for row in rows]
        below = [height - 100 * row["interval"][0] for height, row in zip(heights, rows, strict=True)]
        above = [100 * row["interval"][1] - height for height, row in zip(heights, rows, strict=True)]
        ax.bar(
            [attacks.index(attack) + (i + 0.5) * width - 0.42 for attack in measured],
            heights,
            width,
            yerr=(below, above),
            label=label,
            color=COLOURS[i % len(COLOURS)],
            hatch=HATCHES[i % len(HATCHES)],
            edgecolor="white",
            error_kw={"elinewidth": 1, "capsize": 2},
        )
    ax.set_xticks(range(len(attacks)), [attack_caption(attack, evaluations) for attack in attacks])
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="x", visible=False)
    ax.set_ylim(0)
    ax.set_ylabel("accuracy and 95 % interval (%)")
    figure.suptitle(heading(evaluations))
    legend(figure, ax, columns=2)
    return figure


def attack_caption(attack, evaluations):
    """An attack's name, epsilon and n, on lines of their own; UserError unless every network met the same attack."""
    rows = {evaluation.source: evaluation.rows[attack] for evaluation in evaluations if attack in evaluation.rows}
    (first, expected), *others = rows.items()
    for source, row in others:
        for name in ("epsilon", "step_size"):
            if row.get(name) != expected.get(name):
                raise UserError(f"{attack} in {first} and in {source} differ in {name}: those bars do not compare")
    epsilon = pixel_units(expected["epsilon"]) if "epsilon" in expected else "0"
    return f"{attack_name(attack)}\nε = {epsilon}\nn = {counted(row['n'] for row in rows.values())}"


def pictures(x, x_adv, probabilities, labels, classes, title, epsilon):
    """Images, their perturbation and the attacked images, with the label and the prediction of each.

    x and x_adv (N, 3, H, W) in [0, 1]; probabilities a pair of (N, C), on x and on x_adv; labels (N,). The perturbation
    is magnified so that -epsilon is black, 0 grey and epsilon white; an image that was misclassified before the attack
    keeps its random start, because evaluate.py's attacks leave such an image alone.
    """
    count = len(labels)
    figure = Figure(figsize=(0.9 + 1.05 * count, 4.9), layout="constrained")
    grid = figure.subplots(3, count, squeeze=False)
    magnified = 0.5 + (x_adv - x) / (2 * epsilon)
    lines = {
        "clean": (x, probabilities[0]),
        f"perturbation\n({1 / (2 * epsilon):.0f}-fold)": (magnified, None),
        "attacked": (x_adv, probabilities[1]),
    }
    for line, (name, (content, found)) in zip(grid, lines.items(), strict=True):
        line[0].set_ylabel(name)
        for column, ax in enumerate(line):
            ax.imshow(content[column].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if found is not None:
                share, guess = found[column].max(0)
                right = int(guess) == int(labels[column])
                ax.set_xlabel(
                    f"{'✓' if right else '✗'} {classes[guess]}\n{100 * share:.0f} %",
                    color=RIGHT if right else WRONG,
                    weight="normal" if right else "bold",
                )
    for ax, label in zip(grid[0], labels.tolist(), strict=True):
        ax.set_title(classes[label])
    figure.suptitle(f"{title}\n{count} test images drawn at random")
    return figure


def attacked_images(args):
    """The picture of `images`: a seeded, class-balanced draw of test images, attacked as evaluate.py does."""
    content = load_checkpoint(args.checkpoint, args.target, args.dataset)
    images = load_test_images(args, content)
    model = load_network(content, "target", args.checkpoint, len(images.classes))
    x = pixels(images.x)
    budget = {"epsilon": args.epsilon, "step_size": args.step_size, "seed": args.seed}
    x_adv = attack_batch(model, args.attack, x, images.y, torch.arange(len(x)), **budget)
    with torch.no_grad():
        probabilities = [model(batch).softmax(1) for batch in (x, x_adv)]
    settings = content["settings"]
    trained = f"{method_name(settings['method'])}, " if "method" in settings else ""
    title = f"{trained}target {settings['target']}: {attack_name(args.attack)}, ε = {pixel_units(args.epsilon)}"
    return pictures(x, x_adv, probabilities, images.y, images.classes, title, args.epsilon)


def table(evaluations, labels):
    """A Markdown table: each network's accuracy in percent with its 95 % interval, and the paper's rows below it.

    "All" is the mean over PGD-10, PGD-20, PGD-50, C&W and AA, as in Table 1, where all five were measured. What was
    not measured is blank.
    """
    lines = []
    for evaluation, label in zip(evaluations, labels, strict=True):
        rows = evaluation.rows
        radii = dict.fromkeys(pixel_units(row["epsilon"]) for row in rows.values() if "epsilon" in row)
        line = {
            "method": label,
            "network": next(iter(rows.values()))["name"],
            "n": counted(row["n"] for row in rows.values()),
            "ε": " / ".join(radii),
            **{attack: f"{100 * row['accuracy']:.2f} {_interval(row)}" for attack, row in rows.items()},
        }
        if all(attack in rows for attack in ALL):
            line["all"] = f"{sum(100 * rows[attack]['accuracy'] for attack in ALL) / len(ALL):.2f}"
        lines.append(line)
        lines += [{**row, "method": f"paper, Table {row['table']}"} for row in paper_rows() if _of(row, evaluation)]
    about = ["method", "network", "n", "ε"]
    attacks = sorted({name for line in lines for name in line} - {*about, "table", "dataset"}, key=attack_order)
    headings = ["Method", "Network", "n", "ε", *map(attack_name, attacks)]
    rules = ["---"] * len(about) + ["---:"] * len(attacks)
    body = [[line.get(column, "") for column in about + attacks] for line in lines]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, rules, *body])
    return f"{text}\n\nAccuracy in percent with its 95 % interval (Wilson).\n"


def _of(row, evaluation):
    settings = evaluation.settings
    method = settings.get("method")
    if method == "dynat-awp" and settings.get("kl_weight") == 0:
        method = "dynat-awp:0"
    theirs, ours = (
        (row["method"], row["dataset"], row["network"]),
        (method, settings.get("dataset"), settings["target"]),
    )
    return evaluation.role == "target" and theirs == ours


def _interval(row):
    low, high = row["interval"]
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def save(figure, path):
    """The picture in the file `path`, whole or not at all, in the format of its suffix; the same figure gives the same
    bytes."""
    suffix = path.suffix.lower()
    with written_whole(path) as aside:
        figure.savefig(aside, format=suffix[1:], metadata=UNDATED[suffix])


FROM_RUNS = {"convergence": convergence, "clean": clean, "weak-to-strong": weak_to_strong, "overfitting": overfitting}
FROM_JSON = {"bars": bars, "table": table}


def picture_file(text):
    path = Path(text)
    if path.suffix.lower() not in UNDATED:
        raise UserError(f"--out {text}: it ends in {', '.join(UNDATED)}")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for --out")
    if path.is_dir():
        raise UserError(f"--out {text} is a folder")
    return path


def drawable_attack(text):
    if not re.fullmatch(r"fgsm|cw|pgd[1-9]\d{0,3}", text):
        raise UserError(f"unknown attack '{text}': choose from fgsm, pgd<steps> as pgd20, cw")
    return text


def parser():
    p = Parser(prog="figures.py", description=__doc__)
    kinds = p.add_subparsers(dest="kind", required=True, metavar="FIGURE")
    for kind, draw in {**FROM_RUNS, **FROM_JSON}.items():
        one = kinds.add_parser(kind, description=draw.__doc__, help=draw.__doc__.split(":")[0])
        if kind in FROM_RUNS:
            one.add_argument("sources", type=Path, nargs="+", metavar="RUN", help="a run directory")
        else:
            one.add_argument("sources", type=Path, nargs="+", metavar="JSON", help="a file of evaluate.py --json")
        one.add_argument("--labels", nargs="+", metavar="NAME", help="one per file (default: method and what differs)")
        if kind == "table":
            one.add_argument("--out", type=Path, metavar="FILE", help="default: printed")
        else:
            one.add_argument("--out", type=picture_file, required=True, metavar="FILE", help=".png, .pdf or .svg")
            one.add_argument("--dataset-name", metavar="NAME", help="in the title (default: the --dataset of the runs)")
    one = kinds.add_parser("images", description=attacked_images.__doc__, help="images, perturbation, predictions")
    add = one.add_argument
    add("checkpoint", type=Path, help="a run's last.pt, or a file with weights")
    add("--out", type=picture_file, required=True, metavar="FILE", help=".png, .pdf or .svg")
    add("--target", metavar="NAME", help="what a file with bare weights is, as wrn34-10 (default: the run's)")
    add("--dataset", choices=DATASETS, help="default: the run's")
    add("--data-dir", metavar="D", help="default: the run's, else 'data'")
    add("--images", type=bounded(int, 3, 12), default=6, metavar="N", help="default: 6")
    add("--attack", type=drawable_attack, default="pgd20", help="fgsm, pgd<steps> or cw (default: pgd20)")
    add("--epsilon", type=bounded(number, 1e-3, 1), default=8 / 255, metavar="E",
        help="radius in units of pixels in [0, 1] (default: 8/255, the release)")  # fmt: skip
    add("--step-size", type=bounded(number, 0, 1), default=2 / 255, metavar="A", help="default: 2/255, the paper")
    add("--seed", type=bounded(int, 0), default=0, metavar="S", help="of images and start (default: 0)")
    return p


@command
def main(argv):
    args = parser().parse_args(argv)
    if args.kind == "table":
        evaluations = [found for source in args.sources for found in read_evaluations(source)]
        text = table(evaluations, names(evaluations, args.labels))
        if args.out and args.out.resolve() in [source.resolve() for source in args.sources]:
            raise UserError(f"--out {args.out} would overwrite what it is made of")
        if args.out:
            write_text(args.out, text)
        else:
            print(text, end="")
        return
    with matplotlib.rc_context(STYLE):
        if args.kind == "images":
            figure = attacked_images(args)
        elif args.kind == "bars":
            evaluations = [found for source in args.sources for found in read_evaluations(source)]
            figure = bars(called(evaluations, args.dataset_name), names(evaluations, args.labels))
        else:
            runs = [read_run(source) for source in args.sources]
            figure = FROM_RUNS[args.kind](called(runs, args.dataset_name), names(runs, args.labels))
        save(figure, args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
