"""The page that results/cifar10.py writes: what was measured, and in columns of their own the paper's figures."""

import statistics

import figures

ATTACKS = ("clean", "pgd20", "cw", "aa")  # columns, whether measured or not
IN_PAPER = {"dynat-awp --kl-weight 0": "dynat-awp:0"}  # rows that figures.PAPER spells otherwise
DATA = {"folder": "CIFAR-10, JPEG copy", "cifar10": "CIFAR-10"}  # what --dataset stands for here


def table_row(cells):
    return "| " + " | ".join(cells) + " |"


def table_head(headings):
    return [table_row(headings), table_row(["---"] * len(headings))]


def once(values):
    """Each value once, as text."""
    return ", ".join(dict.fromkeys(map(str, values)))


def row_name(words):
    """The name of a row's folder: 'dynat-awp --kl-weight 0' is dynat-awp-kl-weight-0."""
    return "-".join(word.removeprefix("--") for word in words.split())


def commit(report):
    """A report's commit, eight digits and '+' where files differed from it; blank where none was known."""
    known = report["commit"] or ""
    return known[:8] + ("+" if known.endswith("+") else "")


def evaluated(record):
    """A row's evaluations by what was attacked, last, ema or best: {weights: [report]}; {"": []} if none is there."""
    found = {}
    for name, report in record.get("evaluations", {}).items():
        found.setdefault(name.split("-")[0], []).append(report)
    return dict(sorted(found.items(), key=lambda item: ("last", "ema", "best").index(item[0]))) or {"": []}


def measured(records):
    """All cells of all evaluations."""
    reports = [report for record in records.values() for report in record.get("evaluations", {}).values()]
    return [row for report in reports for row in report["results"]]


def state(record):
    """What a row's blank cells are due to, where it was begun."""
    if "failed" in record:
        return "failed: " + record["failed"].replace("|", "\\|")
    log, settings = record.get("log", []), record.get("config", {}).get("settings", {})
    if not record or len(log) == settings.get("epochs"):
        return ""
    return f"{len(log)} of {settings.get('epochs', '?')} epochs trained"


def accuracy_table(records):
    """Each row's accuracy under each attack and, in columns of their own, the paper's figures of that method."""
    attacks = sorted({*ATTACKS, *(row["attack"] for row in measured(records))}, key=figures.attack_order)
    names = [figures.attack_name(attack) for attack in attacks]
    yield from table_head(["row", "weights", "epoch", *names, "n", "commit", "device", "note", "paper: table", *names])
    for words, record in records.items():
        paper = next((row for row in figures.paper_rows()
                      if (row["dataset"], row["method"]) == ("cifar10", IN_PAPER.get(words, words))), None)  # fmt: skip
        theirs = [f"{paper['table']}, {paper['network']}" if paper else ""]
        theirs += [paper.get(attack, "") if paper else "" for attack in attacks]
        note = state(record)
        for weights, reports in evaluated(record).items():
            rows = {row["attack"]: row for report in reports for row in report["results"]}
            cells = [figures.spread(100 * rows[attack]["accuracy"], rows[attack]["n"]) if attack in rows else ""
                     for attack in attacks]  # fmt: skip
            counts = {}
            for attack in filter(rows.get, attacks):
                counts.setdefault(rows[attack]["n"], []).append(figures.attack_name(attack))
            n = "; ".join(f"{count:,} ({', '.join(those)})" for count, those in counts.items())
            n = n if len(counts) > 1 else once(f"{count:,}" for count in counts)
            origin = [once(commit(report) for report in reports), once(report["device"] for report in reports)]
            epoch = once(report["trained"]["epoch"] for report in reports)
            yield table_row([row_name(words), weights, epoch, *cells, n, *origin, note, *theirs])
            note, theirs = "", [""] * len(theirs)  # in the row's first line


def final(run, name):
    """An accuracy after the last epoch, with its interval where it has one; blank where the log lacks it."""
    if not any(name in row for row in run.log):
        return ""
    return figures.spread(figures.curve(run, name)[1][-1], figures.images_behind(run, name))


def training_table(records):
    """What the logs say: time, how right the dynamic labels are, guide and target, and robust overfitting."""
    yield from table_head([
        "row", "epochs", "seconds per epoch (median)", "images per second (median)", "precision",
        "right dynamic labels: first epoch", "last epoch", "guide, clean test", "target, clean test",
        "epochs with the guide ahead", "target, attacked training batches", "held out, PGD-10: best epoch", "accuracy",
        "last epoch", "commit", "device", "torch",
    ])  # fmt: skip
    for words, record in records.items():
        log, config = record.get("log", []), record.get("config")
        if not log:
            continue
        run = figures.Run(None, config["settings"], log, config["images"])
        both = [row for row in log if "guide_test_acc" in row and "test_acc" in row]
        ahead = sum(row["guide_test_acc"] > row["test_acc"] for row in both)
        best = max((row for row in log if "val_pgd" in row), key=lambda row: row["val_pgd"], default=None)
        yield table_row([
            row_name(words),
            str(len(log)),
            f"{statistics.median(row['seconds'] for row in log):.1f}",
            f"{statistics.median(row['images_per_second'] for row in log):.0f}",
            config["settings"].get("precision", "fp32"),
            f"{log[0]['label_acc']:.1%}" if "label_acc" in log[0] else "",
            f"{log[-1]['label_acc']:.1%}" if "label_acc" in log[-1] else "",
            final(run, "guide_test_acc"),
            final(run, "test_acc"),
            f"{ahead} of {len(both)}" if both else "",
            final(run, "adv_acc"),
            str(best["epoch"]) if best else "",
            figures.spread(100 * best["val_pgd"], figures.images_behind(run, "val_pgd")) if best else "",
            final(run, "val_pgd"),
            commit(config),
            config["device"],
            config["torch"],
        ])  # fmt: skip


def budget(records):
    """The attacks' epsilon and step size: ', epsilon 8/255, step size 2/255 (PGD, C&W)'; empty before the first."""
    text = ""
    for name, shown in (("epsilon", ", epsilon {}"), ("step_size", ", step size {} (PGD, C&W)")):
        values = sorted({figures.pixel_units(row[name]) for row in measured(records) if name in row})
        text += shown.format(once(values)) if values else ""
    return text


def page(results, plan):
    """The gathered results as a page in Markdown: what was measured, how, and the paper's figures beside it. Blank is
    what was not measured.

    results   {"plan": name, "rows": {row: {"row", "train", "failed", "config", "log", "evaluations"}}}, each as far as
    it got; plan, what the rows are: {"about": a sentence, "rows": [words]}.
    """
    found = results["rows"]
    records = {words: found.get(row_name(words), {}) for words in plan["rows"]}
    settings = [record["config"]["settings"] for record in found.values() if "config" in record]
    data = once(DATA[own["dataset"]] for own in settings) or "not measured yet"
    common = [f"{name}: {once(own[name] for own in settings if own.get(name))}" for name in
              ("target", "guide", "epochs", "batch_size", "train_images", "val_images", "ema", "seed")
              if any(own.get(name) for own in settings)]  # fmt: skip
    lines = [
        f"# {data}: plan {results['plan']}",
        "",
        f"{plan['about']} {'; '.join(common)}.",
        "",
        "Accuracy with its 95 % interval (Wilson) on n test images, after the last epoch (`last`; `ema`: the average "
        "of its weights) or after the best on held-out training images (`best`). Attacks in float32, "
        f"one start{budget(records)}. One run each. Blank is what was not measured. The paper's figures, in "
        "percent, are there for the order of the methods: its networks, epochs, images and, under AA, its epsilon are "
        "others.",
        "",
        *accuracy_table(records),
        "",
        "What was logged in training. Dynamic labels and attacked batches are means over the training images while the "
        "weights move.",
        "",
        *training_table(records),
        "",
        "The commands:",
        "",
        "```",
    ]
    for record in filter(None, records.values()):
        reports = [report for found in evaluated(record).values() for report in found]
        lines += [record["train"], *(report["command"] for report in reports)]
    return "\n".join([*lines, "```"]) + "\n"
