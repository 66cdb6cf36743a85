"""Pictures and tables of what was measured, from run directories and from the JSON files of evaluate.py.

    python figures.py convergence runs/dynat-... runs/lbgat-... --out convergence.png       the paper's Fig. 3
    python figures.py clean runs/dynat-... runs/trades-... --out clean.pdf                  its Fig. 4
    python figures.py bars dynat.json trades.json --out bars.svg                            its Fig. 5
    python figures.py weak-to-strong runs/dynat-... --out labels.png                        its Sec. 3.3
    python figures.py overfitting runs/dynat-... runs/pgd-at-... --out overfitting.png      runs with --val-images
    python figures.py images runs/dynat-.../last.pt --out images.png                        what the attack does
    python figures.py table dynat.json trades.json                                          beside its Tables 1 to 4
    python figures.py table results/tiny --out results/tiny.md                              all evaluations in a folder

Every accuracy has its number of images and its 95 % interval (Wilson). Nothing is smoothed. Bars begin at zero.
"""

# Of this project it imports `checkpoints`, `cli`, `data`, `evaluate` and `robustness`.

import csv
import json
import sys
import warnings
from pathlib import Path
from textwrap import fill
from types import SimpleNamespace

import matplotlib
from matplotlib.figure import Figure

from checkpoints import load_network, load_trained
from cli import Parser, UserError, atomic_write, check_file, exit_status, in_range, parse_fraction, write_text
from data import DATASETS, to_float
from evaluate import ALL, load_test_images, wilson
from robustness import ATTACKS, attack_batch, find_attack, split_name

# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow, which is too light for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
HATCHES = ("", "///", "...", "\\\\\\", "xx")
WIDTH = 7.0  # inches: a text column, so that text keeps its size in print
LETTERS = 78  # that fit on a line of this width
STYLE = {
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **{"axes.prop_cycle": matplotlib.cycler(color=COLOURS), "grid.color": "#DDDDDD", "legend.handlelength": 3.0},
    **{"font.size": 10, "axes.titlesize": 10, "figure.titlesize": 11, "lines.markersize": 4.5, "savefig.dpi": 300},
    **{"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "dynat"},  # text stays text; same bytes each time
}
UNDATED = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}  # no time in the file, by suffix
thousands = lambda numbers: " / ".join(f"{n:,}" for n in sorted(set(numbers)))


def attack_title(name):
    """What a page calls an attack, or the mean over five of them, "all"."""
    attack = find_attack(name)
    return attack.title if attack else name.capitalize()


def in_order(names):
    """Attacks in the order of the evaluation's table, PGD by its steps, then "all" and what the table does not have."""

    def position(name):
        key, steps = split_name(name)
        known = [*ATTACKS, "all"]
        return known.index(key) if key in known else len(known), steps, name

    return sorted(names, key=position)


def pictured_attack(name):
    """An argparse type: an attack of one function."""
    attack = find_attack(name)
    if attack is None or attack.function is None:
        names = [name for name, attack in ATTACKS.items() if attack.function]
        raise UserError(f"unknown attack '{name}': choose from {', '.join(names)}")
    return name


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
    train, test, val = (config["images"].get(split) for split in ("train", "test", "val"))
    sizes = {"train_acc": min(train, test), "test_acc": test, "guide_test_acc": test}
    sizes |= {"label_acc": train, "val_pgd": val}
    curves = {
        name: [(epoch, *measured(row[name], n)) for epoch, row in enumerate(log, start=1) if name in row]
        for name, n in sizes.items()
    }
    about = {"title": method_name(config["settings"], folder.name), "source": folder.name}
    runs.append(SimpleNamespace(settings=config["settings"], sizes=sizes, curves=curves, **about))


def read_evaluation(path, networks):
    """Adds the networks in a JSON file of evaluate.py. `rows` are the results by attack. Several files may hold
    different attacks on one network."""
    report = json.loads(read(path))
    trained, checkpoint = report["trained"], Path(report["checkpoint"])
    source = f"{checkpoint.parent.name}/{checkpoint.stem}"
    for row in report["results"]:
        words = [word for word in (report["weights"], row["network"]) if word in ("ema", "guide")]
        title = ", ".join([method_name(trained["settings"], checkpoint.stem), *words])
        row["percent"] = measured(row["correct"] / row["n"], row["n"])
        if "epsilon" in row:
            row["epsilon"] = pixel_units(row["epsilon"])
        key, attack = (title, source, report["sha256"]), str(row["attack"])
        fitting = [network for network in networks if network.key == key and attack not in network.rows]
        if not fitting:
            fitting = [SimpleNamespace(key=key, title=title, source=source, rows={}, **trained)]
            networks += fitting
        fitting[0].rows[attack] = row


def read_all(read_one, paths):
    """The runs or networks that `read_one` finds in these paths. Raises UserError if a file is damaged."""
    if read_one is read_evaluation:  # a folder is all evaluations in it
        nested = [sorted(path.rglob("*.json")) if path.is_dir() else [path] for path in paths]
        paths = [file for files in nested for file in files if file.name != "config.json"]
    found = []
    for path in paths:
        try:
            read_one(path, found)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged, or something else: {error!r}") from None
    return found


def names(items, labels):
    """What to call each: `labels`, or the method, with its source if several have the same. Raises UserError unless
    there is a name for each and no two are the same."""
    titles = [item.title for item in items]
    found = labels or [f"{i.title}, {i.source}" if titles.count(i.title) > 1 else i.title for i in items]
    if not len(set(found)) == len(found) == len(items):
        raise UserError(f"{len(items)} to name, but the names are {', '.join(found)}: give each its own with --labels")
    return found


def shared_settings(items, *names):
    """The settings of these names that all items share, as text: 'dataset tiny, target cnn'."""
    first, *others = (item.settings for item in items)
    shared = [name for name in names if first.get(name) and all(first[name] == other.get(name) for other in others)]
    return ", ".join(f"{name.replace('_', ' ')} {first[name]}" for name in shared)


def with_interval(percent, digits=1):
    """What `measured` says: '83.2 [80.8, 85.4]'."""
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*percent, d=digits)


def plot(ax, run, name, i, style=None):
    """Draws one accuracy of a run's log over its epochs as the i-th curve of `ax`, its interval as a band. Returns the
    line. Raises UserError if the log does not have it."""
    if not run.curves[name]:
        raise UserError(f"the log of {run.source} has no {name}{': train with --val-images' * (name == 'val_pgd')}")
    epochs, accuracies, low, high = zip(*run.curves[name], strict=True)
    if name != "label_acc":  # a mean over an epoch in which the weights change
        ax.fill_between(epochs, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    look = {"color": f"C{i}", "linestyle": style or LINES[i % len(LINES)], "marker": MARKERS[i % len(MARKERS)]}
    (line,) = ax.plot(epochs, accuracies, markevery=max(1, len(epochs) // 12), **look)
    ax.set(xlabel="epoch", ylabel="accuracy (%)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.label_outer()
    return line


def finish(figure, ax, items, text="", sizes=(), columns=1):
    """Adds the title, and below the picture, where it hides nothing, the legend of `ax`. Returns the figure."""
    title = [shared_settings(items, "dataset", "target"), text]
    title += [f"n = {thousands(sizes)}, 95 % intervals"] if sizes else []
    figure.suptitle(fill(", ".join(filter(None, title)), LETTERS))
    handles, labels = ax.get_legend_handles_labels()
    labels = [fill(label, LETTERS // columns - 6) for label in labels]
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)
    return figure


def accuracies(runs, labels, kinds, text):
    """A panel with some accuracies of each run: `kinds` is {name in the log: (words for the legend, line style)}."""
    figure = Figure(figsize=(WIDTH, 3.6 + 0.2 * len(runs) * len(kinds)), layout="constrained")
    ax = figure.subplots()
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        for name, (words, style) in kinds.items():
            line = plot(ax, run, name, i, style)
            ends = f"last {with_interval(run.curves[name][-1][1:])} %"
            if name == "val_pgd":
                epoch, *best = max(run.curves[name], key=lambda point: point[1])
                ends = f"best {with_interval(best)} % in epoch {epoch}, {ends}"
                ax.plot(epoch, best[0], "*", color=f"C{i}", markersize=15, zorder=3)
            line.set_label(f"{label}{words}: {ends}")
    return finish(figure, ax, runs, text, [run.sizes[name] for run in runs for name in kinds])


def convergence(runs, labels):
    """Fig. 3: the target's accuracy per epoch on clean training images (solid) and clean test images (dashed)."""
    kinds = {"train_acc": (", training images", "-"), "test_acc": (", test images", "--")}
    return accuracies(runs, labels, kinds, "clean images")


def clean(runs, labels):
    """Fig. 4: the target's accuracy per epoch on clean test images."""
    return accuracies(runs, labels, {"test_acc": ("", None)}, "clean test images")


def overfitting(runs, labels):
    """Robust overfitting (Rice et al., 2020): accuracy under PGD-10 on held-out training images, from its best epoch, a
    star, to the last. The best of many noisy values is itself a little high."""
    return accuracies(runs, labels, {"val_pgd": ("", None)}, "held-out training images under PGD-10")


def weak_to_strong(runs, labels):
    """Sec. 3.3: the dynamic labels grow from weak to strong, guide and target with them. A panel per run."""
    figure = Figure(figsize=(WIDTH, 1.4 + 2.4 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False).flat
    for ax, run, label in zip(axes, runs, labels, strict=True):
        plot(ax, run, "label_acc", 0).set_label("dynamic labels that are right, training batches")
        plot(ax, run, "guide_test_acc", 1).set_label("guide, clean test images")
        plot(ax, run, "test_acc", 2).set_label("target, clean test images")
        ax.set_title(fill(label, LETTERS), loc="left")
    return finish(figure, axes[0], runs, "from weak to strong", [run.sizes["test_acc"] for run in runs])


def caption(attack, evaluations, separator):
    """An attack's name, epsilon and n. Raises UserError unless the attack was the same on all networks."""
    rows = [evaluation.rows[attack] for evaluation in evaluations if attack in evaluation.rows]
    if len({(row.get("epsilon"), row.get("step_size")) for row in rows}) > 1:
        raise UserError(f"{attack} has another epsilon or step size in some of the files: they do not compare")
    words = [f"ε = {row['epsilon']}" for row in rows[:1] if "epsilon" in row]
    words += [f"n = {thousands(row['n'] for row in rows)}"] if rows else []
    return separator.join([attack_title(attack), *words])


def bars(evaluations, labels):
    """Fig. 5: accuracy per attack, one bar per network, with 95 % intervals. Epsilon and n stand under each attack."""
    attacks = in_order({attack for evaluation in evaluations for attack in evaluation.rows})
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


def paper_rows(settings):
    """The paper's rows of this method, data set and networks, as printed. What is empty there fits anything."""
    rows = csv.DictReader(Path(__file__).with_name("results").joinpath("paper.csv").read_text("utf-8").splitlines())
    names = ("method", "dataset", "target", "guide", "kl_weight")
    same = [row for row in rows if all(row[name] in ("", str(settings.get(name))) for name in names)]
    return [] if settings.get("static_labels") else same


def table(evaluations, labels):
    """A page in Markdown: the accuracy of each network in percent with its 95 % interval, and the paper's below it.
    "All" is the mean over the attacks of Table 1, if all were measured."""
    lines = []
    for evaluation, label in zip(evaluations, labels, strict=True):
        line = {name: with_interval(row["percent"], 2) for name, row in evaluation.rows.items()}
        if line.keys() >= set(ALL):
            line["all"] = f"{sum(evaluation.rows[attack]['percent'][0] for attack in ALL) / len(ALL):.2f}"
        lines.append((label, evaluation.epoch, line))
        for row in paper_rows(evaluation.settings) if "guide" not in evaluation.title else ():
            printed = {name: row[name] for name in in_order(row) if row[name] and (name == "all" or find_attack(name))}
            lines.append((f"paper, Table {row['table']}", "", printed))
    attacks = in_order({attack for *_, line in lines for attack in line})
    cells = [["Method", "Epoch", *(caption(attack, evaluations, ", ") for attack in attacks)]]
    cells += [["---"] + ["---:"] * (1 + len(attacks))]
    cells += [[label, str(epoch or ""), *(line.get(attack, "") for attack in attacks)] for label, epoch, line in lines]
    rows = ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in cells]
    shared = shared_settings(evaluations, "dataset", "target", "guide", "epochs", "train_images", "batch_size", "seed")
    return "\n".join([f"All rows: {shared}.", "", *rows, "", "Accuracy in percent with its 95 % interval (Wilson).\n"])


def attacked_images(args):
    """Test images drawn at random, class-balanced; their perturbation, so that -epsilon is black, 0 grey and epsilon
    white; the attacked images. An image that is misclassified without an attack stays at its random start."""
    content, _ = load_trained(args.checkpoint, args.target, args.dataset)
    images, indices = load_test_images(args, content)
    model = load_network(content, "target", args.checkpoint, len(images.classes))
    x, settings = to_float(images.x), content["settings"]
    budget = {"epsilon": args.epsilon, "step_size": args.step_size, "seed": args.seed}
    x_adv = attack_batch(model, args.attack, x, images.y, indices, **budget)
    short = [fill(name.replace("_", " "), 10, max_lines=2, placeholder="…") for name in images.classes]
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
    figure.suptitle(f"{method_name(settings, 'weights')}, target {settings['target']}: {attack}\n{len(x)} test images")
    return figure


def parser():
    p = Parser(prog="figures.py", description=__doc__)
    kinds = p.add_subparsers(dest="kind", required=True, metavar="FIGURE")
    for draw in (convergence, clean, weak_to_strong, overfitting, bars, table):
        kind = draw.__name__.replace("_", "-")
        one = kinds.add_parser(kind, description=draw.__doc__, help=draw.__doc__.split(":")[0])
        one.set_defaults(draw=draw, read=read_evaluation if draw in (bars, table) else read_run)
        add = one.add_argument
        add("paths", type=Path, nargs="+", metavar="PATH", help="run directories; bars, table: JSON files or folders")
        add("--labels", nargs="+", metavar="NAME", help="one per network (default: method, and folder if need be)")
        add("--dataset-name", metavar="NAME", help="how to call the data set (default: the --dataset of the runs)")
        add("--out", type=Path, required=draw is not table, metavar="FILE", help=".png, .pdf or .svg; of a table .md")
    add = kinds.add_parser("images", description=attacked_images.__doc__, help="what the attack does").add_argument
    add("checkpoint", type=Path, help="a run's last.pt, or a file with weights")
    add("--out", type=Path, required=True, metavar="FILE", help=".png, .pdf or .svg")
    add("--target", metavar="NAME", help="what a file with bare weights is, as wrn34-10 (default: the run's)")
    add("--dataset", choices=DATASETS, help="default: the run's")
    add("--data-dir", type=Path, metavar="D", help="default: the run's, else 'data'")
    add("--images", type=in_range(int, 3, 12), default=6, metavar="N", help="default: 6")
    add("--attack", type=pictured_attack, default="pgd20", metavar="NAME", help="such as fgsm, cw (default: pgd20)")
    add("--epsilon", type=in_range(parse_fraction, 1e-3, 1), default=8 / 255, metavar="E", help="default: 8/255")
    add("--step-size", type=in_range(parse_fraction, 0, 1), default=2 / 255, metavar="A", help="default: 2/255")
    add("--seed", type=in_range(int, 0), default=0, metavar="S", help="of images and start (default: 0)")
    return p


@exit_status
def main(argv):
    args = parser().parse_args(argv)
    suffixes = [".md"] if args.kind == "table" else [*UNDATED]
    suffix = args.out.suffix.lower() if args.out else ".md"
    if suffix not in suffixes:
        raise UserError(f"--out {args.out}: it ends in {', '.join(suffixes)}")
    with matplotlib.rc_context(STYLE):
        if args.kind == "images":
            drawn = attacked_images(args)
        else:
            items = read_all(args.read, args.paths)
            if not items:
                raise UserError(f"there are no results in {args.paths[0]}: evaluate.py --json writes them")
            for item in items:
                item.settings["dataset"] = args.dataset_name or item.settings.get("dataset")
            drawn = args.draw(items, names(items, args.labels))
        if args.kind != "table":
            with atomic_write(args.out) as partial, warnings.catch_warnings(record=True) as caught:
                drawn.savefig(partial, format=suffix[1:], metadata=UNDATED[suffix])
            if caught:  # a letter that the font lacks
                print(f"note: {caught[0].message}", file=sys.stderr)
        elif args.out:
            write_text(args.out, drawn)
    print(args.out or drawn.rstrip())


if __name__ == "__main__":
    sys.exit(main())
