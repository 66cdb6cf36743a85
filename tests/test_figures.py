"""figures.py draws and tables what was logged and measured, in complete files; a mistake gives one line."""

import csv
import json
import math
import os
import subprocess
import sys
from fractions import Fraction

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

import checkpoints
import figures
from evaluate import wilson
from models import build_model

LOG = [
    {"epoch": epoch, "label_acc": 0.3 + 0.1 * epoch, "test_acc": 0.12 * epoch, "train_acc": 0.16 * epoch,
     "guide_test_acc": 0.14 * epoch, "val_clean": 0.11 * epoch, "val_pgd": [0.2, 0.45, 0.5, 0.375][epoch - 1]}
    for epoch in (1, 2, 3, 4)
]  # fmt: skip
del LOG[2]["test_acc"]  # an epoch without a test
CORRECT = {"clean": 893, "pgd10": 529, "pgd20": 518, "pgd50": 515, "cw": 509, "aa": 492}
percent_interval = lambda hits, n: [100 * end for end in wilson(hits, n)]


def make_run(folder, log=LOG, train=300, **settings):
    folder.mkdir()
    settings = {"method": "dynat", "dataset": "tiny", "target": "cnn", "guide": "cnn", **settings}
    images = {"train": train, "val": 200, "test": 1000}
    (folder / "config.json").write_text(json.dumps({"settings": settings, "images": images}))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return folder


def make_json(path, correct=CORRECT, network="target", n=1000, epsilon=8 / 255, run="a", **settings):
    settings = {"method": "dynat", "dataset": "cifar10", "target": "wrn34-10", "guide": "resnet18", **settings}
    rows = []
    for attack, hits in correct.items():
        row = {"network": network, "attack": attack, "n": n, "correct": hits, "accuracy": hits / n}
        rows.append(row if attack == "clean" else {**row, "epsilon": epsilon, "step_size": 2 / 255})
    report = {"checkpoint": f"runs/{run}/last.pt", "sha256": run, "weights": "last", "results": rows}
    path.write_text(json.dumps({**report, "trained": {"epoch": 76, "settings": settings}}))
    return path


def made(kind, *paths, out="a.png", **options):
    """What `figures.py kind paths` makes: a picture, not yet saved, or a page."""
    words = [kind, *map(str, paths), "--out", out]
    for name, value in options.items():
        words += [f"--{name}", *value]
    args = figures.parser().parse_args(words)
    return args.make(args)


@pytest.mark.parametrize(("kind", "names"), [
    ("convergence", ["train_acc", "test_acc"]),
    ("clean", ["test_acc"]),
    ("weak-to-strong", ["label_acc", "guide_test_acc", "test_acc"]),
    ("overfitting", ["val_pgd"]),
])  # fmt: skip
def test_the_values_drawn_are_those_of_the_log(tmp_path, kind, names):
    (ax,) = made(kind, make_run(tmp_path / "run")).axes
    curves = [line.get_data() for line in ax.get_lines() if line.get_marker() != "*"]
    logged = [[(row["epoch"], 100 * row[name]) for row in LOG if name in row] for name in names]
    assert [[*zip(*curve, strict=True)] for curve in curves] == logged


def test_bands_and_legends_are_intervals_of_the_images_behind_an_accuracy(tmp_path):
    paths = make_run(tmp_path / "run"), make_run(tmp_path / "more", train=3000)
    run, more = figures.read_all(figures.read_run, paths)
    assert run.sizes.items() >= {"train_acc": 300, "test_acc": 1000, "guide_test_acc": 1000, "val_pgd": 200}.items()
    assert more.sizes["train_acc"] == 1000
    (ax,) = made("overfitting", tmp_path / "run").axes
    low, high = percent_interval(100, 200)
    assert f"best 50.0 [{low:.1f}, {high:.1f}] % in epoch 3, last 37.5 [" in ax.get_legend_handles_labels()[1][0]
    ends = [y for x, y in ax.collections[0].get_paths()[0].vertices if x == 3]
    assert (min(ends), max(ends)) == pytest.approx((low, high))


def test_bars_are_the_accuracies_and_intervals_of_the_json(tmp_path):
    other = {"aa": 400, "pgd20": 600}
    (ax,) = made("bars", make_json(tmp_path / "a.json"), make_json(tmp_path / "b.json", other, run="b")).axes
    ticks = [text.get_text().split("\n")[0] for text in ax.get_xticklabels()]
    assert ticks == ["Clean", "PGD-10", "PGD-20", "PGD-50", "C&W", "AA"] and ax.get_ylim()[0] == 0
    ends = iter(ax.get_lines())
    for correct, box in zip((CORRECT, other), ax.containers, strict=True):
        for bar, (attack, hits) in zip(box, correct.items(), strict=True):
            assert bar.get_height() == pytest.approx(hits / 10)
            assert round(bar.get_x() + bar.get_width() / 2) == list(CORRECT).index(attack)
            assert list(next(ends).get_ydata()) == pytest.approx(percent_interval(hits, 1000))


def test_a_table_row_is_the_json_and_the_papers_row_stands_below(tmp_path):
    *page, _ = made("table", make_json(tmp_path / "a.json"), labels=["ours|mine\n$x$"])
    ours, paper = page[2]
    for attack, hits in CORRECT.items():
        low, high = percent_interval(hits, 1000)
        assert ours[attack] == f"{hits / 10:.2f} [{low:.2f}, {high:.2f}]"
    assert (ours["all"], ours["Epoch"]) == ("51.26", "76")
    assert [*paper.values()][2:] == ["89.16", "52.88", "51.78", "51.49", "50.88", "49.20", "51.25"]
    text = figures.as_markdown(*page)
    assert "| ours\\|mine $x$ | 76 | 89.30 [" in text and "AA, ε = 8/255, n = 1,000" in text
    assert "dataset cifar10, target wrn34-10, guide resnet18" in text
    *page, _ = made("table", make_json(tmp_path / "b.json", network="guide"))
    assert "paper" not in figures.as_markdown(*page)


def test_the_papers_rows_are_those_of_method_networks_and_data_set():
    ours = {"method": "dynat", "dataset": "cifar10", "target": "wrn34-10", "guide": "resnet18"}
    rows = lambda **other: {row["table"]: row["clean"] for row in figures.paper_rows({**ours, **other})}
    assert rows(method="gairat") == {"1": "86.30", "3": "86.30"}
    assert rows(method="dynat-awp", kl_weight=0.0) == {"1": "90.27"} and rows(dataset="cifar100") == {"2": "67.25"}
    assert rows(guide="cnn") == rows(static_labels=True) == {}


def test_a_folder_is_all_its_evaluations_and_one_network_one_row(tmp_path):
    """AutoAttack on fewer images has a file of its own; "All" needs each of its attacks."""
    attacks = {name: hits for name, hits in CORRECT.items() if name != "aa"}
    for name in "ab":
        make_json(make_run(tmp_path / name) / "last.json", attacks, run=name, epochs=7)
    make_json(tmp_path / "a" / "aa.json", {"aa": 40}, n=100, run="a", epochs=7)
    head, _, (first, second), *_ = made("table", tmp_path, **{"dataset-name": ["mine"]})
    assert (first["Method"], second["Method"]) == ("DYNAT, a/last", "DYNAT, b/last")
    assert first["aa"].startswith("40.00 [") and first["all"] == "49.42" and not second.keys() & {"aa", "all"}
    assert "dataset mine" in head and "epochs 7" in head


def test_no_text_is_cut_off_and_a_dollar_is_a_dollar(tmp_path):
    runs = [make_run(tmp_path / i, dataset="cifar100", target="wrn34-10") for i in "12"]
    labels = [f"DYNAT-Inner-GAIRAT, $\\frac{i}$, static labels, train images 40000, epochs 120" for i in "12"]
    evaluations = [make_json(tmp_path / f"{i}.json", run=i) for i in "12"]
    with matplotlib.rc_context(figures.STYLE):
        for kind in ("convergence", "clean", "weak-to-strong", "overfitting", "bars"):
            figure = made(kind, *(evaluations if kind == "bars" else runs), labels=labels)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            texts = [text for ax in figure.axes for text in (ax._left_title, ax.xaxis.label, ax.yaxis.label)]
            for text in [figure._suptitle, *figure.legends[0].get_texts(), *texts]:
                box = text.get_window_extent(canvas.get_renderer())
                inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
                assert inside or not text.get_text(), text


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    content = {"target": build_model("cnn", 10).state_dict(), "epoch": 1, "classes": [f"class{i}" for i in range(10)]}
    content["settings"] = {"method": "dynat", "dataset": "tiny", "data_dir": None, "target": "cnn"}
    checkpoints.save(tmp_path / "last.pt", content)
    return tmp_path / "last.pt"


@pytest.mark.parametrize("kind", ["weak-to-strong.pdf", "overfitting.PNG", "bars.svg", "images.png"])
def test_every_picture_is_the_only_file_and_of_the_same_bytes_each_time(tmp_path, checkpoint, kind):
    sources = {"bars.svg": make_json(tmp_path / "a.json"), "images.png": checkpoint}
    out = tmp_path / "pictures" / kind
    out.parent.mkdir()
    words = [kind.split(".")[0], str(sources.get(kind) or make_run(tmp_path / "a")), "--out", str(out)]
    assert figures.main(words) == 0 and list(out.parent.iterdir()) == [out]
    content = out.read_bytes()
    assert figures.main(words) == 0 and out.read_bytes() == content


def test_the_perturbation_is_magnified_so_that_epsilon_is_white_and_half_of_it_light(checkpoint, monkeypatch):
    monkeypatch.setattr(figures, "attack_batch", lambda model, name, x, *_, epsilon, **__: x + epsilon / 2)
    axes = made("images", checkpoint, epsilon=["0.1"], images=["3"]).axes
    clean, perturbation, attacked = np.split(np.stack([np.asarray(ax.get_images()[0].get_array()) for ax in axes]), 3)
    assert np.allclose(perturbation, 0.75, atol=1e-5) and np.allclose(attacked, (clean + 0.05).clip(0, 1), atol=1e-6)
    for ax in axes[:3]:
        guess, mark, _, _ = ax.get_xlabel().split()
        assert mark == ("✓" if guess == ax.get_title() else "✗")


def mistake(capsys, words, says):
    assert figures.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err and len(err) < 250, err


@pytest.mark.parametrize(("arguments", "says"), [
    ("clean run --out a.gif", "it ends in .png, .pdf, .svg"),
    ("clean run --out a.png --labels A B", "1 to name, but the names are A, B: give each its own with --labels"),
    ("clean pipe --out a.png", "pipe/log.jsonl is not a file"),
    ("clean empty --out a.png", "the log of empty has no test_acc"),
    ("clean cut --out a.png", "cut is damaged"),
    ("overfitting plain --out a.png", "plain has no val_pgd: train with --val-images"),
    ("bars 4.json 8.json --out a.png", "pgd10 has another epsilon"),
    ("table 4.json other.json", "2 to name, but the names are DYNAT, 4/last, seed ?, DYNAT, 4/last, seed ?: give"),
    ("bars weights.pt --out a.png", "weights.pt is damaged, or something else: "),
    ("compare s1.json s1.json,s2.json", "A and B have not as many paths"),
    ("compare 4.json,8.json 4.json,8.json", "4.json,8.json: not a network for each"),
    ("table run", "there are no results in run"),
    ("table correct.json", "correct.json is damaged"),
])  # fmt: skip
def test_a_mistake_or_a_damaged_file_gives_one_line_and_no_file(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    for name, log in {"run": LOG, "plain": [{"test_acc": 0.5}], "empty": [], "cut": LOG, "pipe": LOG}.items():
        make_run(tmp_path / name, log)
    (tmp_path / "cut" / "log.jsonl").write_text('{"epoch": 1, "te')
    (tmp_path / "pipe" / "log.jsonl").unlink()
    os.mkfifo(tmp_path / "pipe" / "log.jsonl")
    for i in (4, 8):
        make_json(tmp_path / f"{i}.json", epsilon=i / 255, run=str(i))
    for seed in (1, 2):
        make_json(tmp_path / f"s{seed}.json", seed=seed)
    make_json(tmp_path / "other.json", {"clean": 1}, epsilon=4 / 255, run="4")
    make_json(tmp_path / "correct.json", {"clean": 1001})
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04" + bytes([255] * 9999))
    before = sorted(tmp_path.rglob("*"))
    mistake(capsys, arguments.split(), says)
    assert sorted(tmp_path.rglob("*")) == before


def with_matrix(path, masks, test_images="pixels", y=0, **settings):
    """An evaluation with its matrix: `masks` are {attack: (n,) bool}."""
    n = len(next(iter(masks.values())))
    make_json(path, {attack: int(mask.sum()) for attack, mask in masks.items()}, n=n, run=path.stem, **settings)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_images": test_images}))
    columns = {f"target {attack}": mask for attack, mask in masks.items()}
    np.savez(path.with_suffix(".npz"), **columns, y=np.full(n, y), indices=np.arange(n))
    return str(path)


def compared(out, *paths):
    assert figures.main(["compare", *paths, "--out", str(out)]) == 0
    return [*csv.DictReader(out.read_text().splitlines())]


counts = st.integers(0, 10_000)


@given(counts, counts, counts)
def test_a_paired_difference_changes_its_sign_with_the_order_and_p_is_the_binomials(only_a, only_b, others):
    n = only_a + only_b + others + 1
    low, high = figures.paired_interval(only_a, only_b, n)
    assert -1 <= low < high <= 1 and low <= (only_b - only_a) / n <= high
    assert figures.paired_interval(only_b, only_a, n) == (-high, -low)
    assert 0 <= figures.mcnemar(only_a, only_b) == figures.mcnemar(only_b, only_a) <= 1
    a, b = only_a % 40, only_b % 40
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1))
    assert figures.mcnemar(a, b) == min(1, float(Fraction(2 * tail, 2 ** (a + b))))


@pytest.mark.parametrize("both", [(0.02, 0.02), (0.1, 0.05), (0.01, 0.003), (0.3, 0.2)])
def test_the_paired_interval_holds_the_true_difference_19_times_of_20(both):
    draws = np.random.default_rng(0).multinomial(1000, [*both, 1 - sum(both)], size=4000)
    ends = [figures.paired_interval(only_a, only_b, 1000) for only_a, only_b, _ in draws.tolist()]
    assert 0.93 < np.mean([low <= both[1] - both[0] <= high for low, high in ends]) < 0.97


def test_compare_counts_the_images_that_one_network_alone_has_right(tmp_path, capsys):
    rng, pairs, differences = np.random.default_rng(0), [], []
    for seed in (1, 2, 3):
        a, b = rng.random((2, 500)) < [[0.5], [0.6]]
        paths = tmp_path / f"a-s{seed}.json", tmp_path / f"b-s{seed}.json"
        side_a = with_matrix(paths[0], {"clean": a, "pgd10": a & b}, seed=seed)
        pairs.append([side_a, with_matrix(paths[1], {"clean": b, "pgd10": b, "cw": b}, seed=seed, beta=2.0)])
        clean, pgd = compared(tmp_path / "one.csv", *pairs[-1])
        alone = [str((a & ~b).sum()), str((b & ~a).sum())]
        assert [clean["A alone"], clean["B alone"]] == alone and pgd["A alone"] == "0"
        assert float(clean["B - A"]) == pytest.approx(100 * (b.mean() - a.mean()))
        differences.append(float(clean["B - A"]))
    mean = compared(tmp_path / "all.csv", *(",".join(side) for side in zip(*pairs, strict=True)))[3]
    half = 4.303 * np.std(differences, ddof=1) / 3**0.5
    assert float(mean["B - A"]) == pytest.approx(np.mean(differences)) and mean["seed"] == "mean of 3"
    assert float(mean["high"]) - float(mean["B - A"]) == pytest.approx(half)
    itself, _ = compared(tmp_path / "same.csv", pairs[0][0], pairs[0][0])
    assert float(itself["low"]) < float(itself["B - A"]) == 0 < float(itself["high"]) and itself["p"] == "1.0"
    capsys.readouterr()
    assert figures.main(["compare", *pairs[0]]) == 0 and "PGD-10" in capsys.readouterr().out


@pytest.mark.parametrize(("other", "says"), [
    ({"y": 1}, "clean is of other images or labels in"),
    ({"test_images": "others"}, "clean is of other images or labels in"),
    ({"test_images": None}, "clean is of other images or labels in"),
    ({"masks": {"clean": np.ones(9, bool)}}, "clean is of other images or labels in"),
    ({"masks": {"pgd10": np.ones(8, bool)}, "epsilon": 4 / 255}, "pgd10 has another epsilon"),
    ({"masks": {"cw": np.ones(8, bool)}}, "no attack on the same network in common"),
    ("missing", "there is no file b.npz"),
    ("stale", "b.npz is damaged, or not of the JSON file beside it"),
    ("cut", "b.npz is damaged, or not of the JSON file beside it"),
])  # fmt: skip
def test_what_is_not_paired_is_not_compared(tmp_path, monkeypatch, capsys, other, says):
    monkeypatch.chdir(tmp_path)
    masks = {"clean": np.ones(8, bool), "pgd10": np.zeros(8, bool)}
    with_matrix(figures.Path("a.json"), masks)
    with_matrix(figures.Path("b.json"), **({"masks": masks} | (other if isinstance(other, dict) else {})))
    if other == "missing":
        os.remove("b.npz")
    if other == "stale":
        with_matrix(figures.Path("c.json"), {"clean": np.zeros(8, bool)})
        os.replace("c.npz", "b.npz")
    if other == "cut":
        os.truncate("b.npz", 300)
    mistake(capsys, ["compare", "a.json", "b.json"], says)


def test_runs_that_differ_in_the_seed_alone_are_one_row(tmp_path, capsys):
    for seed, correct in {1: 500, 2: 520, 3: 570}.items():
        make_json(tmp_path / f"{seed}.json", {"clean": correct}, run=f"dynat-s{seed}", seed=seed, data_dir=str(seed))
    make_json(tmp_path / "aa.json", {"aa": 40}, n=100, run="dynat-s1", seed=1, data_dir="1")
    make_json(tmp_path / "beta.json", {"clean": 600}, run="dynat-s1-beta", seed=1, beta=2.0, dataset="tiny")
    _, _, (mean, _, beta), *_ = made("table", tmp_path, labels=["A", "B"])
    assert (mean["Method"], mean["clean"]) == ("A, 3 seeds", "53.00 ± 3.61") and beta["clean"].startswith("60.00 [")
    assert mean["aa"].startswith("40.00 [") and mean["aa"].endswith("(1 of 3 seeds)")
    words = ["table", str(tmp_path), "--out", str(tmp_path / "out.csv")]
    assert figures.main(words) == figures.main([*words, "--by-seed", "--dataset-name", "mine"]) == 0
    rows = [*csv.DictReader((tmp_path / "out.csv").read_text().splitlines())]
    accuracies = [(row["attack"], float(row["accuracy"])) for row in rows]
    assert accuracies[:2] == [("clean", 50), ("aa", 40)] and len(rows) == 5


def test_epsilon_and_scatter_draw_the_measured_accuracies(tmp_path):
    for i in (4, 8):
        make_json(tmp_path / f"{i}.json", {"clean": 800, "pgd20": 700 - 50 * i}, epsilon=i / 255)
    (ax,) = made("epsilon", tmp_path).axes
    assert [line.get_xydata().round(9).tolist() for line in ax.get_lines()] == [[[0, 80], [4, 50], [8, 30]]]
    for seed in (1, 2):
        make_json(tmp_path / f"{seed}.json", {"clean": 100 * seed, "pgd20": 10 * seed}, seed=seed, run=f"-s{seed}")
    (ax,) = made("scatter", tmp_path / "1.json", tmp_path / "2.json").axes
    assert ax.get_lines()[0].get_xydata().tolist() == [[10, 1], [20, 2]]


def test_a_persons_settings_never_reach_a_picture_and_odd_letters_are_escaped_or_noted(tmp_path, capsys):
    run, out, rc = make_run(tmp_path / os.fsdecode(b"caf\xe9")), tmp_path / "a.svg", tmp_path / "matplotlibrc"
    words = ["clean", str(run), "--labels", os.fsdecode(b"\xe9"), "--out", str(out)]
    assert figures.main(["clean", str(run), "--labels", "中文字", "--out", str(out)]) == figures.main(words) == 0
    err, content = capsys.readouterr().err, out.read_bytes()
    assert err.startswith("note: ") and err.count("\n") == 1
    assert b"\\udce9: last" in content
    rc.write_text("font.size: 30\nsvg.fonttype: path\npath.sketch: 1, 9, 2\nbackend: nothing\nno colon")
    person = {"MPLBACKEND": "nothing", "MATPLOTLIBRC": str(rc), "LC_ALL": "C"}
    done = subprocess.run([sys.executable, ROOT / "figures.py", *words], env=os.environ | person, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and out.read_bytes() == content
