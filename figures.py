"""Pictures and tables of what was measured, from run directories and from the JSON files of evaluate.py.

    python figures.py clean runs/dynat-... runs/trades-... --out clean.pdf      accuracy by epoch
    python figures.py bars dynat.json trades.json --out bars.svg                accuracy by attack
    python figures.py images runs/dynat-.../last.pt --out images.png            what the attack does
    python figures.py table results/tiny --out results/tiny.md                  all evaluations in a folder
    python figures.py compare a1.json,a2.json b1.json,b2.json --out ab.csv      image by image, a pair for each seed

Every accuracy has its number of images and its 95 % interval (Wilson). Nothing is smoothed. Bars begin at zero.
"""

# Of this project it imports `checkpoints`, `cli`, `data`, `evaluate` and `robustness`.

import csv
import io
import json
import locale
import logging
import math
import os
import re
import statistics
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from textwrap import fill
from types import SimpleNamespace

import numpy as np

from checkpoints import load_network, load_trained
from cli import (
    Parser,
    UserError,
    atomic_write,
    check_file,
    exit_status,
    in_range,
    parse_fraction,
    parse_fractions,
    write_text,
)
from data import DATASETS, to_float
from evaluate import ALL, NORMALISE, load_test_images, wilson
from robustness import ATTACKS, attack_batch, find_attack, split_name

# A person's matplotlibrc and MPLBACKEND are read by the import, and used nowhere: main() begins with the defaults.
os.environ.pop("MPLBACKEND", None)
logging.getLogger("matplotlib").setLevel(logging.ERROR)
try:
    import matplotlib
    from matplotlib.figure import Figure
except (OSError, ValueError, locale.Error) as error:
    print(f"error: matplotlib cannot read its settings (matplotlibrc): {error}", file=sys.stderr)
    sys.exit(2)

# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow, which is too light for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
HATCHES = ("", "///", "...", "\\\\\\", "xx")
WIDTH = 7.0  # inches: a text column, so that text keeps its size in print
INTERVAL = "{:.1f} [{:.1f}, {:.1f}] %"  # of what `measured` says
LETTERS = 78  # that fit on a line of this width
STYLE = {  # on top of matplotlib's own defaults, never of a person's matplotlibrc
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.titlesize": 10,
    "figure.titlesize": 11,
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "lines.markersize": 4.5,
    "savefig.dpi": 300,
    "text.parse_math": False,  # a dollar is a dollar
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "dynat",  # the same bytes each time
}
UNDATED = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}  # no time in the file, by suffix
# Student's t, two-sided 95 %, for 2 to 10 seeds (1 to 9 degrees of freedom); for more the last, a little too wide.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
FORMATS = {"A": ".2f", "B": ".2f", "B - A": "+.2f", "low": "+.2f", "high": "+.2f", "p": ".2g", "sd": ".2f", "n": ","}
IDLE = {"seed", "data_dir", "eval_every", "keep_from", "deterministic"}  # settings that two seeds may differ in
CURVES = {  # by picture: {accuracy in the log: (words for the legend, line style)}, and what the images are
    "convergence": ({"train_acc": (", training images", "-"), "test_acc": (", test images", "--")}, "clean images"),
    "clean": ({"test_acc": ("", None)}, "clean test images"),
    "overfitting": ({"val_pgd": ("", None)}, "held-out training images under PGD-10"),
}
thousands = lambda numbers: " / ".join(f"{n:,}" for n in sorted(set(numbers)))


def attack_title(name):
    """What a page calls an attack, or the mean over five of them, "all"."""
    attack = find_attack(name)
    return attack.title if attack else name.capitalize()


def position(name):
    """To sort attacks as the evaluation's table does, PGD by its steps, then "all" and what the table does not have."""
    key, steps = split_name(name)
    known = [*ATTACKS, "all"]
    return known.index(key) if key in known else len(known), steps, name


def measured(accuracy, n):
    """An accuracy on n images and both ends of its 95 % interval, in percent. Raises ValueError if it cannot be one."""
    return tuple(100 * share for share in (accuracy, *wilson(round(accuracy * n), n)))


def pixel_units(epsilon):
    """A radius as people write it: 8/255 if it is a whole number of pixel values, else 0.031."""
    steps = round(epsilon * 255)
    return f"{steps}/255" if abs(steps - epsilon * 255) < 1e-6 else f"{epsilon:g}"


def method_name(settings, otherwise):
    """The method as the paper spells it: dynat-inner-awp is DYNAT-Inner-AWP. `otherwise` if the settings name none."""
    return settings.get("method", otherwise).upper().replace("INNER", "Inner")


def read(path):
    """What is in the file `path`. Raises UserError if there is none."""
    check_file(path)
    return path.read_bytes()


def read_run(folder, runs):
    """Adds the run in a directory of train_dynat.py. By name of an accuracy in its log, `sizes` is the number of images
    behind it, `curves` has its points (epoch, accuracy, low, high)."""
    config = json.loads(read(folder / "config.json"))
    log = [json.loads(line) for line in read(folder / "log.jsonl").splitlines()]
    settings, images = config["settings"], config["images"]
    run = SimpleNamespace(settings=settings, title=method_name(settings, folder.name), source=folder.name, curves={})
    run.sizes = {
        "train_acc": min(images["train"], images["test"]),
        "test_acc": images["test"],
        "guide_test_acc": images["test"],
        "label_acc": images["train"],
        "val_pgd": images.get("val"),
    }
    for name, n in run.sizes.items():
        run.curves[name] = [(epoch, *measured(row[name], n)) for epoch, row in enumerate(log, start=1) if name in row]
    runs.append(run)


def read_evaluation(path, networks):
    """Adds the networks in a JSON file of evaluate.py. `rows` are the results by attack. Several files may hold
    different attacks on one network; with another result it is another item with the same `key`."""
    report = json.loads(read(path))
    settings, checkpoint = report["trained"]["settings"], Path(report["checkpoint"])
    source = f"{checkpoint.parent.name}/{checkpoint.stem}"
    for row in report["results"]:
        role, attack = row["network"], str(row["attack"])
        marks = [word for word in (report["weights"], role) if word in ("ema", "guide")]
        title = ", ".join([method_name(settings, checkpoint.stem), *marks])
        key = (title, source, report["sha256"], settings.get("seed"))
        row |= {"file": path, "test_images": report.get("test_images")}
        fitting = [network for network in networks if network.key == key and fits(row, network.rows.get(attack, row))]
        if not fitting:
            about = {"key": key, "title": title, "source": source, "role": role}
            fitting = [SimpleNamespace(**about, rows={}, **report["trained"])]
            networks += fitting
        fitting[0].rows[attack] = {**row, "percent": measured(row["correct"] / row["n"], row["n"])}


def fits(row, known):
    """Whether two rows of JSON files, for example of clean images, say the same of the same images."""
    return all(row.get(name) == known.get(name) for name in ("n", "correct", "epsilon", "test_images"))


def read_all(read_one, paths):
    """The runs or networks that `read_one` finds in these paths. UserError if there is none or one is damaged."""
    files = paths
    if read_one is read_evaluation:  # a folder is all evaluations in it
        nested = [sorted(path.rglob("*.json")) if path.is_dir() else [path] for path in paths]
        files = [file for files in nested for file in files if file.name != "config.json"]
    found = []
    for path in files:
        try:
            read_one(path, found)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}, {error}".split())
            raise UserError(f"{path} is damaged, or something else: {reason[:100]}") from None
    if not found:
        raise UserError(f"there are no results in {paths[0]}: evaluate.py --json writes them")
    return found


def grouped(items, belongs=None):
    """Groups, each the copy of its first item with `members`. `belongs(item, group)` lets an item join."""
    groups = []
    for item in items:
        group = next((group for group in groups if belongs and belongs(item, group)), None)
        if group is None:
            group = SimpleNamespace(**vars(item), members=[])
            groups.append(group)
        group.members.append(item)
    for group in groups:
        seeds = dict.fromkeys(str(item.settings.get("seed")) for item in group.members)
        if len(seeds) > 1:
            group.settings = {**group.settings, "seed": ", ".join(seeds)}
            group.source = re.sub(r"-s(eed-)?\d+(?=[-/])", "", group.source)
    return groups


def seed_alone(network, group):
    """Whether a network differs from a group in its seed alone. Settings that one lacks do not count."""
    seed, stem = network.settings.get("seed"), Path(network.source).name  # last or best
    if seed is None or seed in [member.settings.get("seed") for member in group.members]:
        return False
    both = (network.settings.keys() & group.settings.keys()) - IDLE
    same = all(network.settings[name] == group.settings[name] for name in both)
    return same and (network.title, stem) == (group.title, Path(group.source).name)


def printable(text):
    """The text, with what is no character, as in a file's name that is not UTF-8, in escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_named(args, read_one, belongs=None):
    """The groups of the runs or networks in `args.paths`, and what to call each: --labels, or the method, with its
    source and then its seed where several have the same. Raises UserError unless each has a name of its own."""
    items = read_all(read_one, args.paths)
    for item in items:
        item.settings["dataset"] = args.dataset_name or item.settings.get("dataset")
    groups = grouped(items, belongs)
    found = args.labels or [group.title for group in groups]
    if not args.labels:
        for more in ([group.source for group in groups], [f"seed {g.settings.get('seed', '?')}" for g in groups]):
            twice = [name for name in found if found.count(name) > 1]
            found = [f"{n}, {word}" if n in twice else n for n, word in zip(found, more, strict=True)]
    found = [printable(name) for name in found]
    if not len(set(found)) == len(found) == len(groups):
        raise UserError(f"{len(groups)} to name, but the names are {', '.join(found)}: give each its own with --labels")
    return groups, found


def shared_settings(items, *names):
    """The settings of these names that all items share, as text: 'dataset tiny, target cnn'."""
    first, *others = (item.settings for item in items)
    shared = [name for name in names if first.get(name) and all(first[name] == other.get(name) for other in others)]
    return printable(", ".join(f"{name.replace('_', ' ')} {first[name]}" for name in shared))


def draw_curve(ax, points, i, style=None, band=True):
    """Draws points (x, accuracy, low, high) as the i-th curve of `ax`, the interval as a band. Returns the line."""
    x, accuracies, low, high = zip(*points, strict=True)
    if band:
        ax.fill_between(x, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    look = {"color": f"C{i}", "linestyle": style or LINES[i % len(LINES)], "marker": MARKERS[i % len(MARKERS)]}
    (line,) = ax.plot(x, accuracies, markevery=max(1, len(x) // 12), **look)
    ax.set(ylabel="accuracy (%)")
    return line


def plot(ax, run, name, i, style=None):
    """Draws one accuracy of a run's log over its epochs. Raises UserError if the log does not have it."""
    if not run.curves[name]:
        advice = ": train with --val-images" if name == "val_pgd" else ""
        raise UserError(f"the log of {run.source} has no {name}{advice}")
    # label_acc is a mean over an epoch in which the weights change: it has no interval
    line = draw_curve(ax, run.curves[name], i, style, band=name != "label_acc")
    ax.set(xlabel="epoch")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.label_outer()
    return line


def finish(figure, ax, items, text="", sizes=(), columns=1):
    """Adds the title, and below the picture, where it hides nothing, the legend of `ax`. Returns the figure."""
    title = [shared_settings(items, "dataset", "target"), text]
    if sizes:
        title.append(f"n = {thousands(sizes)}, 95 % intervals")
    figure.suptitle(fill(", ".join(part for part in title if part), LETTERS))
    handles, labels = ax.get_legend_handles_labels()
    labels = [fill(label, LETTERS // columns - 6) for label in labels]
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)
    return figure


def accuracies(args):
    """A panel with some accuracies of each run, and a star at the best one under attack."""
    runs, labels = read_named(args, read_run)
    kinds, text = CURVES[args.kind]
    figure = Figure(figsize=(WIDTH, 3.6 + 0.2 * len(runs) * len(kinds)), layout="constrained")
    ax = figure.subplots()
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        for name, (words, style) in kinds.items():
            line = plot(ax, run, name, i, style)
            ends = f"last {INTERVAL.format(*run.curves[name][-1][1:])}"
            if name == "val_pgd":
                epoch, *best = max(run.curves[name], key=lambda point: point[1])
                ends = f"best {INTERVAL.format(*best)} in epoch {epoch}, {ends}"
                ax.plot(epoch, best[0], "*", color=f"C{i}", markersize=15, zorder=3)
            line.set_label(f"{label}{words}: {ends}")
    return finish(figure, ax, runs, text, [run.sizes[name] for run in runs for name in kinds])


def weak_to_strong(args):
    """A panel per run: the dynamic labels, the guide and the target."""
    runs, labels = read_named(args, read_run)
    figure = Figure(figsize=(WIDTH, 1.4 + 2.4 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False).flat
    for ax, run, label in zip(axes, runs, labels, strict=True):
        plot(ax, run, "label_acc", 0).set_label("dynamic labels that are right, training batches")
        plot(ax, run, "guide_test_acc", 1).set_label("guide, clean test images")
        plot(ax, run, "test_acc", 2).set_label("target, clean test images")
        ax.set_title(fill(label, LETTERS), loc="left")
    return finish(figure, axes[0], runs, "from weak to strong", [run.sizes["test_acc"] for run in runs])


def caption(attack, networks, separator):
    """An attack's name, epsilon and n. Raises UserError unless the attack was the same on all networks."""
    rows = [network.rows[attack] for network in networks if attack in network.rows]
    if len({(pixel_units(row.get("epsilon", 0)), row.get("step_size")) for row in rows}) > 1:
        raise UserError(f"{attack} has another epsilon or step size in some of the files: they do not compare")
    words = [attack_title(attack)]
    if rows and "epsilon" in rows[0]:
        words.append(f"ε = {pixel_units(rows[0]['epsilon'])}")
    if rows:
        words.append(f"n = {thousands(row['n'] for row in rows)}")
    return separator.join(words)


def bars(args):
    """A bar per attack and network, with 95 % intervals. Epsilon and n stand under each attack."""
    evaluations, labels = read_named(args, read_evaluation)
    attacks = sorted({attack for evaluation in evaluations for attack in evaluation.rows}, key=position)
    figure = Figure(figsize=(WIDTH, 3.6 + 0.1 * len(evaluations)), layout="constrained")
    ax = figure.subplots()
    width = 0.84 / len(evaluations)
    for i, (evaluation, label) in enumerate(zip(evaluations, labels, strict=True)):
        places = [attacks.index(attack) + (i + 0.5) * width - 0.42 for attack in evaluation.rows]
        heights, low, high = zip(*(row["percent"] for row in evaluation.rows.values()), strict=True)
        ax.bar(places, heights, width, label=label, hatch=HATCHES[i % len(HATCHES)], edgecolor="white")
        ax.plot([places, places], [low, high], "k_-", linewidth=1, markeredgecolor="k")
    ax.set_xticks(range(len(attacks)), [caption(attack, evaluations, "\n") for attack in attacks])
    ax.grid(axis="x", visible=False)
    ax.set(ylabel="accuracy and 95 % interval (%)", ylim=(0, None))
    return finish(figure, ax, evaluations, columns=2)


def accuracy_by_epsilon(args):
    """A band is the 95 % interval. At epsilon 0 stands the clean accuracy, if it is of as many images."""
    groups, labels = read_named(args, read_evaluation, lambda network, group: network.key == group.key)
    curves = {}
    for group, label in zip(groups, labels, strict=True):
        rows = [(attack, row) for network in group.members for attack, row in network.rows.items()]
        for attack in sorted({attack for attack, _ in rows} - {"clean"}, key=position):
            sizes = {row["n"] for name, row in rows if name == attack}
            shown = [row for name, row in rows if name in (attack, "clean") and row["n"] in sizes]
            points = {(255 * row.get("epsilon", 0), *row["percent"]) for row in shown}
            if len({x for x, *_ in points}) < len(points):
                raise UserError(f"{attack} on {label} has several accuracies at one epsilon")
            curves[f"{label}: {attack_title(attack)}, n = {thousands(sizes)}"] = sorted(points)
    figure = Figure(figsize=(WIDTH, 3.6 + 0.2 * len(curves)), layout="constrained")
    ax = figure.subplots()
    for i, (label, points) in enumerate(curves.items()):
        draw_curve(ax, points, i).set_label(label)
    ax.set(xlabel="ε (in 1/255)", ylim=(0, None))
    return finish(figure, ax, groups, "95 % intervals")


def scatter(args):
    """A point per run with both 95 % intervals. A line joins runs that differ in the seed alone."""
    groups, labels = read_named(args, read_evaluation, seed_alone)
    attack = args.attack
    networks = [network for group in groups for network in group.members]
    for network in networks:
        if not network.rows.keys() >= {"clean", attack}:
            raise UserError(f"{network.source} was not measured under clean and {attack}: see --attack")
    figure = Figure(figsize=(WIDTH, 3.8 + 0.1 * len(groups)), layout="constrained")
    ax = figure.subplots()
    for i, (group, label) in enumerate(zip(groups, labels, strict=True)):
        x, x_low, x_high = np.array([network.rows["clean"]["percent"] for network in group.members]).T
        y, y_low, y_high = np.array([network.rows[attack]["percent"] for network in group.members]).T
        ends = {"xerr": (x - x_low, x_high - x), "yerr": (y - y_low, y_high - y)}
        ax.errorbar(x, y, **ends, marker=MARKERS[i % len(MARKERS)], linewidth=1, elinewidth=0.5, label=label)
    ax.set(xlabel=f"{caption('clean', networks, ', ')} (%)", ylabel=f"{caption(attack, networks, ', ')} (%)")
    return finish(figure, ax, groups, "95 % intervals, lines join seeds", columns=2)


def paper_rows(settings):
    """The paper's rows of this method, data set and networks, as printed. What is empty there fits anything."""
    rows = csv.DictReader(Path(__file__).with_name("results").joinpath("paper.csv").read_text("utf-8").splitlines())
    names = ("method", "dataset", "target", "guide", "kl_weight")
    same = [row for row in rows if all(row[name] in ("", str(settings.get(name))) for name in names)]
    return [] if settings.get("static_labels") else same


def summary(percents):
    """The accuracy of one run with its interval, or the mean and standard deviation of several, in percent."""
    if len(percents) == 1:
        return {"seeds": 1, **dict(zip(("accuracy", "low", "high"), percents[0], strict=False))}
    accuracies = [accuracy for accuracy, *_ in percents]
    return {"seeds": len(percents), "accuracy": statistics.mean(accuracies), "sd": statistics.stdev(accuracies)}


def cell(record, seeds):
    """A record as '47.84 [46.86, 48.82]' or '47.70 ± 0.17', and of how many of the `seeds` it is, if not of all."""
    text = f"{record['accuracy']:.2f}"
    if "low" in record:
        text += f" [{record['low']:.2f}, {record['high']:.2f}]"
    if "sd" in record:
        text += f" ± {record['sd']:.2f}"
    return text if record["seeds"] == seeds else f"{text} ({record['seeds']} of {seeds} seeds)"


def table(args):
    """A row per network or per networks that differ in the seed alone, and the paper's below it. "All" is the mean over
    the attacks of Table 1, if all were measured. Returns a page: head, {column: heading}, rows, foot, records."""
    groups, labels = read_named(args, read_evaluation, None if args.by_seed else seed_alone)
    networks = [network for group in groups for network in group.members]
    lines = []  # (name, epoch, seeds, {attack: accuracies with their intervals})
    for group, label in zip(groups, labels, strict=True):
        percents, seeds = {}, len(group.members)
        for network in group.members:
            for attack, row in network.rows.items():
                percents.setdefault(attack, []).append(row["percent"])
            if network.rows.keys() >= set(ALL):
                mean = statistics.mean(network.rows[attack]["percent"][0] for attack in ALL)
                percents.setdefault("all", []).append([mean])
        epochs = thousands(network.epoch for network in group.members if network.epoch)
        lines.append((f"{label}, {seeds} seeds" if seeds > 1 else label, epochs, seeds, percents))
        for row in paper_rows(group.settings) if group.role == "target" else ():
            attacks = [name for name in row if row[name] and (name == "all" or find_attack(name))]
            lines.append((f"paper, Table {row['table']}", "", 1, {name: [[float(row[name])]] for name in attacks}))
    rows, records = [], []
    for label, epochs, seeds, percents in lines:
        rows.append({"Method": label, "Epoch": epochs})
        for attack in sorted(percents, key=position):
            records.append({"method": label, "epoch": epochs, "attack": attack, **summary(percents[attack])})
            rows[-1][attack] = cell(records[-1], seeds)
    attacks = sorted({record["attack"] for record in records}, key=position)
    columns = {"Method": "Method", "Epoch": "Epoch"} | {attack: caption(attack, networks, ", ") for attack in attacks}
    shared = shared_settings(groups, "dataset", "target", "guide", "epochs", "train_images", "batch_size", "seed")
    foot = "Accuracy in percent with its 95 % interval (Wilson)"
    if len(networks) > len(groups):
        foot += "; of several seeds the mean ± the standard deviation"
    return f"All rows: {shared}.", columns, rows, f"{foot}.", records


def paired_interval(only_a, only_b, n):
    """The 95 % interval of the difference B - A of two accuracies on the same n images, as fractions (low, high).
    `only_a` and `only_b` images are correct in A alone and in B alone. Source: the adjusted Wald interval of Bonett and
    Price (2012), J. Educ. Behav. Stat. 37, 479-488, which counts one more image of each kind."""
    a, b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = 1.959964 * math.sqrt((a + b - (b - a) ** 2) / (n + 2))
    return max(-1.0, b - a - half), min(1.0, b - a + half)


def mcnemar(only_a, only_b):
    """The exact two-sided p of McNemar's test: twice the tail of the binomial at 1/2, at most 1, in whole numbers."""
    n, ways, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):
        tail += ways  # to choose k of n
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def read_matrix(network, attack):
    """From the .npz beside the JSON: the images still correct under the attack, (n,) bool; their labels and indices."""
    row = network.rows[attack]
    path = row["file"].with_suffix(".npz")
    content = read(path)
    try:
        with np.load(io.BytesIO(content)) as matrix:
            mask, y, indices = (matrix[name] for name in (f"{network.role} {attack}", "y", "indices"))
        whole = mask.dtype == bool and mask.shape == (row["n"],) and mask.sum() == row["correct"]
    except (AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged, or not of the JSON file beside it")
    return mask, y[: row["n"]], indices[: row["n"]]


def paired_difference(attack, a, b):
    """A row of `compare`, in percent. Raises UserError if the images or labels of the networks a and b differ."""
    row_a, row_b = a.rows[attack], b.rows[attack]
    (mask_a, y_a, indices_a), (mask_b, y_b, indices_b) = read_matrix(a, attack), read_matrix(b, attack)
    same = np.array_equal(y_a, y_b) and np.array_equal(indices_a, indices_b)
    if not same or row_a["test_images"] is None or row_a["test_images"] != row_b["test_images"]:
        raise UserError(f"{attack} is of other images or labels in {row_a['file']} and {row_b['file']}")
    n, only_a, only_b = len(mask_a), int((mask_a & ~mask_b).sum()), int((mask_b & ~mask_a).sum())
    low, high = paired_interval(only_a, only_b, n)
    seeds = dict.fromkeys(str(network.settings.get("seed", "?")) for network in (a, b))
    about = {"network": a.role, "attack": attack_title(attack), "n": n, "seed": ", ".join(seeds)}
    about["epsilon"] = pixel_units(row_a["epsilon"]) if "epsilon" in row_a else ""
    accuracies = {"A": row_a["percent"][0], "B": row_b["percent"][0], "B - A": 100 * (only_b - only_a) / n}
    ends = {"low": 100 * low, "high": 100 * high}
    return {**about, **accuracies, **ends, "A alone": only_a, "B alone": only_b, "p": mcnemar(only_a, only_b)}


def mean_difference(rows):
    """The row of means over the seeds; the interval of the difference is Student's, from its standard deviation."""
    accuracies = {name: statistics.mean(row[name] for row in rows) for name in ("A", "B", "B - A")}
    sd = statistics.stdev(row["B - A"] for row in rows)
    half = STUDENT_T[min(len(rows), 10) - 2] * sd / math.sqrt(len(rows))
    ends = {"low": accuracies["B - A"] - half, "high": accuracies["B - A"] + half}
    blank = {"seed": f"mean of {len(rows)}", "A alone": "", "B alone": "", "p": ""}
    return {**rows[0], **accuracies, **ends, **blank, "sd": sd}


def compare(args):
    """The differences B - A between two networks on the same images, one pair for each seed, as a page."""
    sides = []  # {role: the group of its networks, one for each path}
    for text in (args.a, args.b):
        paths = [Path(name) for name in text.split(",")]
        groups = grouped(read_all(read_evaluation, paths), seed_alone)
        sides.append({group.role: group for group in groups})
        if len(sides[-1]) < len(groups) or any(len(group.members) != len(paths) for group in groups):
            raise UserError(f"{text}: not a network for each, which differ in the seed alone")
    side_a, side_b = sides
    rows = []
    for role in [role for role in side_a if role in side_b]:
        if len(side_a[role].members) != len(side_b[role].members):
            raise UserError("A and B have not as many paths: they are compared in pairs")
        pairs = [*zip(side_a[role].members, side_b[role].members, strict=True)]
        for attack in sorted({attack for a, b in pairs for attack in a.rows.keys() & b.rows.keys()}, key=position):
            both = [(a, b) for a, b in pairs if attack in a.rows and attack in b.rows]
            caption(attack, [network for pair in both for network in pair], "")  # raises if they do not compare
            found = [paired_difference(attack, a, b) for a, b in both]
            rows += [*found, mean_difference(found)] if len(found) > 1 else found
    if not rows:
        raise UserError("A and B have no attack on the same network in common")
    titles = []
    for side in sides:
        first = next(iter(side.values()))  # the column "network" has the role
        titles.append(f"{first.title.removesuffix(', guide')}, {first.source}")
    foot = (
        "Accuracy in percent; B - A in points with its 95 % interval for paired proportions (Bonett and Price, 2012); "
        "images that are correct in A alone and in B alone; p of McNemar's exact test, two-sided."
    )
    if len(pairs) > 1:
        foot += " Mean of the seeds: standard deviation of the differences, Student's 95 % interval."
    columns = {name: name for name in max(rows, key=len)}
    return f"A: {titles[0]}. B: {titles[1]}.", columns, rows, foot, rows


def as_markdown(head, columns, rows, foot, aligned=False):
    """A page as Markdown. `aligned`: its columns stand below each other, for a terminal."""
    lines = [columns.values()]
    for row in rows:
        lines.append([format(row[name], FORMATS.get(name, "")) if row.get(name, "") != "" else "" for name in columns])
    lines = [[" ".join(text.split()).replace("|", "\\|") for text in line] for line in lines]
    widths = [max(4, *map(len, column)) if aligned else 0 for column in zip(*lines, strict=True)]
    lines.insert(1, ["---".ljust(widths[0], "-"), *("---:".rjust(width, "-") for width in widths[1:])])
    text = f"{head}\n\n"
    for first, *rest in lines:
        text += "| " + " | ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) + " |\n"
    return printable(f"{text}\n{foot}\n")


def as_csv(records):
    """Records as CSV, unrounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for record in records for name in record), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return printable(text.getvalue())


def attacked_images(args):
    """Test images drawn at random, class-balanced; their perturbation, so that -epsilon is black, 0 grey and epsilon
    white; the attacked images. An image that is misclassified without an attack stays at its random start."""
    if getattr(find_attack(args.attack), "function", None) is None:
        names = [name for name, attack in ATTACKS.items() if attack.function]
        raise UserError(f"attack '{args.attack}' cannot be drawn: choose from {', '.join(names)}")
    content, _ = load_trained(args.checkpoint, args.target, args.dataset, normalise=args.normalise)
    images, indices = load_test_images(args, content)
    model = load_network(content, args.network, args.checkpoint, len(images.classes))
    x, settings = to_float(images.x), content["settings"]
    budget = {"epsilon": args.epsilon, "step_size": args.step_size, "seed": args.seed}
    x_adv = attack_batch(model, args.attack, x, images.y, indices, **budget)
    short = [fill(printable(name).replace("_", " "), 10, max_lines=2, placeholder="…") for name in images.classes]
    figure = Figure(figsize=(0.9 + 1.05 * len(x), 5.2), layout="constrained")
    rows = [("clean", x), ("perturbation", 0.5 + (x_adv - x) / (2 * args.epsilon)), ("attacked", x_adv)]
    for axes, (name, pictures) in zip(figure.subplots(3, len(x)), rows, strict=True):
        axes[0].set_ylabel(name)
        probabilities = model(pictures).softmax(1)  # (N, C)
        for ax, picture, y, p in zip(axes, pictures, images.y.tolist(), probabilities, strict=True):
            ax.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[], title=short[y] if name == "clean" else "")
            ax.spines[:].set_visible(False)
            if name in ("clean", "attacked"):
                mark, look = ("✓", {"color": "C0"}) if p.argmax() == y else ("✗", {"color": "C1", "weight": "bold"})
                ax.set_xlabel(f"{short[p.argmax()]}\n{mark} {100 * p.max():.0f} %", **look)
    attack = f"{attack_title(args.attack)}, ε = {pixel_units(args.epsilon)}"
    network = f"{method_name(settings, 'weights')}, {args.network} {settings[args.network]}"
    figure.suptitle(f"{network}: {attack}\n{len(x)} test images")
    return figure


FIGURES = (  # name, function, help
    ("convergence", accuracies, "accuracy by epoch on training and test images (the paper's Fig. 3)"),
    ("clean", accuracies, "accuracy by epoch on clean test images (the paper's Fig. 4)"),
    ("weak-to-strong", weak_to_strong, "dynamic labels, guide and target by epoch (Sec. 3.3)"),
    ("overfitting", accuracies, "accuracy under PGD-10 by epoch on held-out training images"),
    ("bars", bars, "accuracy under each attack (the paper's Fig. 5)"),
    ("epsilon", accuracy_by_epsilon, "accuracy under each attack against epsilon"),
    ("scatter", scatter, "accuracy under an attack against clean accuracy"),
    ("table", table, "all accuracies, beside the paper's Tables 1 to 4"),
    ("compare", compare, "two networks image by image, B - A"),
    ("images", attacked_images, "what the attack does to test images"),
)


def parser():
    p = Parser(prog="figures.py", description=__doc__)
    kinds = p.add_subparsers(dest="kind", required=True, metavar="FIGURE")
    for name, make, text in FIGURES:
        one = kinds.add_parser(name, description=make.__doc__, help=text)
        add, is_page = one.add_argument, make in (table, compare)
        suffixes = [".md", ".csv"] if is_page else [*UNDATED]
        one.set_defaults(make=make, is_page=is_page, suffixes=suffixes)
        add("--out", type=Path, required=not is_page, metavar="FILE", help=", ".join(suffixes))
        if make is compare:
            add("a", metavar="A", help="a JSON file of evaluate.py or a folder; A1,A2,A3 for three seeds")
            add("b", metavar="B", help="as many")
        elif make is attacked_images:
            add_image_options(add)
        else:
            what = "run directories" if make in (accuracies, weak_to_strong) else "JSON files of evaluate.py, folders"
            add("paths", type=Path, nargs="+", metavar="PATH", help=what)
            add("--labels", nargs="+", metavar="NAME", help="one per network (default: method, and folder if need be)")
            add("--dataset-name", metavar="NAME", help="how to call the data set (default: the --dataset of the runs)")
        if make is table:
            add("--by-seed", action="store_true", help="a row per run, not one for runs that differ in the seed alone")
        if make is scatter:
            add("--attack", default="pgd20", metavar="NAME", help="on the vertical axis")
    return p


def add_image_options(add):
    """The options of `images`."""
    add("checkpoint", type=Path, help="a run's last.pt, or a file with weights")
    add("--network", choices=("target", "guide"), default="target", help="which one is attacked (default: target)")
    add("--target", metavar="NAME", help="what a file with bare weights is, as wrn34-10 (default: the run's)")
    add("--normalise", nargs=2, type=parse_fractions, metavar=("MEAN", "STD"), help=NORMALISE)
    add("--dataset", choices=DATASETS, help="default: the run's")
    add("--data-dir", type=Path, metavar="D", help="default: the run's, else 'data'")
    add("--images", type=in_range(int, 3, 12), default=6, metavar="N", help="default: 6")
    add("--attack", default="pgd20", metavar="NAME", help="such as fgsm, cw (default: pgd20)")
    add("--epsilon", type=in_range(parse_fraction, 1e-3, 1), default=8 / 255, metavar="E", help="default: 8/255")
    add("--step-size", type=in_range(parse_fraction, 0, 1), default=2 / 255, metavar="A", help="default: 2/255")
    add("--seed", type=in_range(int, 0), default=0, metavar="S", help="of images and start (default: 0)")


@exit_status
def main(argv):
    args = parser().parse_args(argv)
    suffix = args.out.suffix.lower() if args.out else None
    if args.out and suffix not in args.suffixes:
        raise UserError(f"--out {args.out}: it ends in {', '.join(args.suffixes)}")
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context(defaults | STYLE):
        made = args.make(args)
        if not args.is_page:
            with atomic_write(args.out) as partial, warnings.catch_warnings(record=True) as caught:
                made.savefig(partial, format=suffix[1:], metadata=UNDATED[suffix])
            if caught:  # a letter that the font lacks
                print(f"note: {caught[0].message}", file=sys.stderr)
    if args.is_page and args.out:
        *page, records = made
        write_text(args.out, as_csv(records) if suffix == ".csv" else as_markdown(*page))
    print(args.out or as_markdown(*made[:-1], aligned=True).rstrip())


if __name__ == "__main__":
    sys.exit(main())
