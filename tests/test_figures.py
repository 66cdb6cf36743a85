"""figures.py draws and tables what was logged and measured, in whole files; a mistake gives one line."""

import json
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
import torch
from cases import mutant, mutant_module
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import checkpoints
import figures
from evaluate import wilson
from models import build_model

CURVES = ["convergence", "clean", "weak-to-strong", "overfitting"]
LOG = [
    {"epoch": epoch, "label_acc": 0.3 + 0.1 * epoch, "adv_acc": 0.1 * epoch, "test_acc": 0.12 * epoch,
     "guide_test_acc": 0.14 * epoch, "val_clean": 0.11 * epoch, "val_pgd": [0.2, 0.45, 0.5, 0.375][epoch - 1]}
    for epoch in (1, 2, 3, 4)
]  # fmt: skip


def make_run(folder, log=LOG, **settings):
    folder.mkdir()
    settings = {"method": "dynat", "dataset": "tiny", "target": "cnn", "beta": 1.0, **settings}
    config = {"settings": settings, "classes": ["a", "b"], "images": {"train": 300, "val": 200, "test": 1000}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return folder


def make_json(path, correct, network="target", epsilon=8 / 255, **settings):
    """An evaluation of 1,000 images, `correct` of them by attack."""
    settings = {"method": "dynat", "dataset": "cifar10", "target": "wrn34-10", "guide": "resnet18", **settings}
    rows = []
    for attack, hits in correct.items():
        row = {"network": network, "name": settings[network], "attack": attack, "n": 1000, "correct": hits}
        row |= {"accuracy": hits / 1000, "interval": wilson(hits, 1000)}
        rows.append(row if attack == "clean" else {**row, "epsilon": epsilon, "step_size": 2 / 255})
    path.write_text(json.dumps({"trained": {"settings": settings}, "results": rows}))
    return path


MEASURED = {"clean": 893, "pgd10": 529, "pgd20": 518, "pgd50": 515, "cw": 509, "aa": 492}


def drawn(figure):
    """The curves of a picture: their values, by panel and in order, of those that have a marker at every epoch."""
    return [[line.get_ydata() for line in ax.get_lines() if len(line.get_xdata()) == 4] for ax in figure.axes]


def check_curves(module, folder):
    runs = [module.read_run(folder)]
    fields = {
        module.convergence: [["adv_acc"], ["test_acc"]],
        module.clean: [["test_acc"]],
        module.weak_to_strong: [["label_acc", "guide_test_acc", "test_acc"]],
        module.overfitting: [["val_pgd"]],
    }
    for draw, panels in fields.items():
        for values, names in zip(drawn(draw(runs, ["DYNAT"])), panels, strict=True):
            for value, name in zip(values, names, strict=True):
                assert list(value) == pytest.approx([100 * row[name] for row in LOG]), (draw.__name__, name)


def test_the_values_drawn_are_those_of_the_log(tmp_path):
    check_curves(figures, make_run(tmp_path / "run"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('plot(left, run, "adv_acc"', 'plot(left, run, "label_acc"'),
        ('plot(right, run, "test_acc"', 'plot(right, run, "guide_test_acc"'),
        ('plot(ax, run, "val_pgd"', 'plot(ax, run, "val_clean"'),
        ("100 * row[name]) for row in run.log", "100 * row[name]) for row in run.log[::-1]"),
        ('"test_acc": "target, clean', '"adv_acc": "target, clean'),
    ],
)
def test_a_picture_of_other_values_is_rejected(tmp_path, old, new):
    with pytest.raises(AssertionError):
        check_curves(mutant_module(figures, (old, new)), make_run(tmp_path / "run"))


def test_epochs_without_a_test_are_left_out(tmp_path):
    """--eval-every 2 leaves test_acc out of every other row: no epoch is moved, nothing is made up between them."""
    log = [{name: value for name, value in row.items() if name != "test_acc" or row["epoch"] % 2 == 0} for row in LOG]
    assert figures.curve(figures.read_run(make_run(tmp_path / "run", log)), "test_acc") == ((2, 4), (24.0, 48.0))


def check_dataset_name(module, folder):
    """The title names the data set as told, and the name of nothing else changes."""
    titles = []
    save, module.save = module.save, lambda figure, path: titles.append(figure.get_suptitle())
    try:
        run, report = str(make_run(folder / "run")), str(make_json(folder / "a.json", MEASURED))
        for arguments in (["clean", run], ["bars", report], ["clean", run, "--dataset-name", "CIFAR-10, JPEG copy"],
                          ["bars", report, "--dataset-name", "CIFAR-10, JPEG copy"]):  # fmt: skip
            assert module.main([*arguments, "--out", str(folder / "a.png")]) == 0
    finally:
        module.save = save
    assert [title.split(", target")[0] for title in titles] == ["tiny", "cifar10", *["CIFAR-10, JPEG copy"] * 2]


def test_a_folder_of_images_can_be_called_by_its_name(tmp_path):
    check_dataset_name(figures, tmp_path)


@pytest.mark.parametrize("items", ["evaluations", "runs"])
def test_a_picture_without_the_name_is_rejected(tmp_path, items):
    with pytest.raises(AssertionError):
        check_dataset_name(mutant_module(figures, (f"called({items}, args.dataset_name)", items)), tmp_path)


def check_best_and_last(overfitting, folder):
    (ax,) = overfitting([figures.read_run(folder)], ["DYNAT"]).axes
    (label,) = ax.get_legend_handles_labels()[1]
    low, high = wilson(100, 200)
    best = f"best 50.0 % [{100 * low:.1f}, {100 * high:.1f}] in epoch 3"
    assert best in label and "last 37.5 %" in label, label


def test_overfitting_states_best_and_last_with_the_held_out_images_interval(tmp_path):
    check_best_and_last(figures.overfitting, make_run(tmp_path / "run"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max(percent), percent[-1]", "min(percent), percent[-1]"),
        ("max(percent), percent[-1]", "max(percent), percent[0]"),
        ('n, best, last = images_behind(run, "val_pgd")', 'n, best, last = images_behind(run, "test_acc")'),
    ],
)
def test_another_best_or_last_is_rejected(tmp_path, old, new):
    with pytest.raises(AssertionError):
        check_best_and_last(mutant(figures.overfitting, (old, new)), make_run(tmp_path / "run"))


def check_bars(bars, folder):
    """Heights, and both ends of the intervals, of two files whose attacks differ."""
    paths = [make_json(folder / "a.json", MEASURED), make_json(folder / "b.json", {"aa": 400, "pgd20": 600}, beta=0.5)]
    evaluations = [found for path in paths for found in figures.read_evaluations(path)]
    (ax,) = bars(evaluations, ["A", "B"]).axes
    assert [text.get_text().split("\n")[0] for text in ax.get_xticklabels()] == [
        "Clean", "PGD-10", "PGD-20", "PGD-50", "C&W", "AA",
    ]  # fmt: skip
    assert ax.get_ylim()[0] == 0
    errors = [container for container in ax.containers if not hasattr(container, "patches")]
    boxes = [container for container in ax.containers if hasattr(container, "patches")]
    for evaluation, box, error in zip(evaluations, boxes, errors, strict=True):
        expected = sorted(evaluation.rows.values(), key=lambda row: list(MEASURED).index(row["attack"]))
        assert [bar.get_height() for bar in box] == pytest.approx([100 * row["accuracy"] for row in expected])
        assert [round(bar.get_x() + bar.get_width() / 2) for bar in box] == [
            list(MEASURED).index(row["attack"]) for row in expected
        ]
        ends = [tuple(segment[:, 1]) for segment in error.lines[2][0].get_segments()]
        for end, row in zip(ends, expected, strict=True):
            assert end == pytest.approx(tuple(100 * side for side in row["interval"]))


def test_bars_are_the_accuracies_and_intervals_of_the_json(tmp_path):
    check_bars(figures.bars, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("yerr=(below, above)", "yerr=(above, below)"),
        ('heights = [100 * row["accuracy"]', 'heights = [99 * row["accuracy"]'),
        ("attacks.index(attack)", "measured.index(attack)"),
        ("ax.set_ylim(0)", "ax.set_ylim(30)"),
    ],
)
def test_dishonest_bars_are_rejected(tmp_path, old, new):
    with pytest.raises(AssertionError):
        check_bars(mutant(figures.bars, (old, new)), tmp_path)


def cells(text):
    """A Markdown table's rows, as dicts by heading."""
    headings, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n\n")[0].split("\n")
    )
    return [dict(zip(headings, row, strict=True)) for row in rows]


def check_table(table, folder):
    path = make_json(folder / "a.json", MEASURED)
    ours, paper = cells(table(figures.read_evaluations(path), ["DYNAT"]))
    for row in json.loads(path.read_text())["results"]:
        low, high = (100 * side for side in row["interval"])
        assert ours[figures.attack_name(row["attack"])] == f"{row['correct'] / 10:.2f} [{low:.2f}, {high:.2f}]"
    assert (ours["All"], ours["n"], ours["ε"], ours["Network"]) == ("51.26", "1,000", "8/255", "wrn34-10")
    assert paper["Method"] == "paper, Table 1"
    assert list(paper.values())[4:] == ["89.16", "52.88", "51.78", "51.49", "50.88", "49.20", "51.25"]


def test_a_table_row_is_the_json_and_the_papers_row_stands_below(tmp_path):
    check_table(figures.table, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{100 * row['accuracy']:.2f}", "{100 * row['interval'][0]:.2f}"),
        ("/ len(ALL)", "/ len(rows)"),
        ("if _of(row, evaluation)", "if not _of(row, evaluation)"),
        ("key=attack_order", "reverse=True"),
    ],
)
def test_a_wrong_table_is_rejected(tmp_path, old, new):
    with pytest.raises((AssertionError, ValueError)):
        check_table(mutant(figures.table, (old, new)), tmp_path)


@pytest.mark.parametrize(
    ("settings", "tables"),
    [
        ({"method": "gairat"}, {"1": "86.30", "3": "86.30"}),
        ({"method": "dynat-awp", "kl_weight": 0.0}, {"1": "90.27"}),
        ({"method": "dynat-awp", "kl_weight": 1.0}, {"1": "88.41"}),
        ({"method": "mail-mse", "target": "resnet18"}, {"4": "82.99"}),
        ({"method": "dynat", "dataset": "cifar100"}, {"2": "67.25"}),
        ({"method": "dynat", "dataset": "tiny"}, {}),
    ],
)
def test_the_papers_rows_are_those_of_method_network_and_data_set(tmp_path, settings, tables):
    evaluations = figures.read_evaluations(make_json(tmp_path / "a.json", {"clean": 900}, **settings))
    found = {row["Method"]: row["Clean"] for row in cells(figures.table(evaluations, ["ours"]))[1:]}
    assert found == {f"paper, Table {number}": value for number, value in tables.items()}


def test_the_papers_column_all_is_the_mean_of_its_attacks():
    """A slip in copying a row of Table 1 shows here: the paper cuts the mean off after two digits, or rounds it."""
    rows = [row for row in figures.paper_rows() if "all" in row]
    assert len(rows) == 11
    for row in rows:
        mean = sum(float(row[attack]) for attack in figures.ALL) / len(figures.ALL)
        assert abs(mean - float(row["all"])) < 0.01, row


def test_what_was_not_measured_is_blank(tmp_path):
    ours, paper = cells(figures.table(figures.read_evaluations(make_json(tmp_path / "a.json", {"pgd20": 500})), ["A"]))
    assert ours["Clean"] == ours["AA"] == ours["All"] == "" and paper["Clean"] == "89.16"


def test_bars_of_attacks_that_differ_are_refused(tmp_path, capsys):
    files = [str(make_json(tmp_path / f"{i}.json", {"pgd20": 500}, epsilon=i / 255, beta=i)) for i in (4, 8)]
    assert figures.main(["bars", *files, "--out", str(tmp_path / "bars.png")]) == 2
    assert capsys.readouterr().err.endswith("differ in epsilon: those bars do not compare\n")


def test_runs_are_named_by_method_and_what_sets_them_apart(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", beta=0.5), make_run(tmp_path / "c", method="lbgat")]
    runs = [figures.read_run(folder) for folder in folders]
    assert figures.names(runs, None) == ["DYNAT, beta 1", "DYNAT, beta 0.5", "LBGAT"]
    assert figures.names(runs, ["x", "y", "z"]) == ["x", "y", "z"]
    for wrong in (["x"], ["x", "y", "y"]):
        with pytest.raises(figures.UserError, match="--labels"):
            figures.names(runs, wrong)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    settings = {"method": "dynat", "dataset": "tiny", "data_dir": None, "target": "cnn"}
    content = {"target": build_model("cnn", 10).state_dict(), "settings": settings}
    path = tmp_path / "last.pt"
    checkpoints.save(path, {**content, "classes": [f"class{label}" for label in range(10)]})
    return path


def check_inside(module, folder):
    """Every text of every picture lies on the canvas, also where names and titles are long."""
    long = {"dataset": "cifar100", "target": "wrn34-10"}
    runs = [
        module.read_run(make_run(folder / f"{i}", method="dynat-inner-gairat", beta=i / 7, **long)) for i in (1, 2, 3)
    ]
    labels = [f"{name}, train images 40000, epochs 120" for name in module.names(runs, None)]
    paths = [make_json(folder / f"{i}.json", MEASURED, method="dynat-inner-gairat", beta=i) for i in (1, 2, 3)]
    evaluations = [found for path in paths for found in module.read_evaluations(path)]
    with matplotlib.rc_context(module.STYLE):
        pictures = [draw(runs, labels) for draw in module.FROM_RUNS.values()] + [module.bars(evaluations, labels)]
        for figure in pictures:
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            legend_texts = [text for legend in figure.legends for text in legend.get_texts()]
            titles = [text for ax in figure.axes for text in (ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label)]
            for text in [figure._suptitle, *legend_texts, *titles]:
                box = text.get_window_extent(canvas.get_renderer())
                inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
                assert inside or not text.get_text(), text


def test_no_text_is_cut_off(tmp_path):
    check_inside(figures, tmp_path)


def test_text_that_is_cut_off_is_rejected(tmp_path):
    with pytest.raises(AssertionError):
        check_inside(mutant_module(figures, ("fill(label, LETTERS // columns - 6)", "label")), tmp_path)


def assert_whole(path):
    if path.suffix.lower() == ".png":
        with Image.open(path) as picture:
            picture.load()
            assert picture.width >= 1000 and len(picture.convert("L").getcolors()) > 20
    elif path.suffix == ".svg":
        assert len(list(ElementTree.parse(path).iter())) > 50
    else:
        content = path.read_bytes()
        assert content.startswith(b"%PDF") and content.rstrip().endswith(b"%%EOF") and len(content) > 5000


@pytest.mark.parametrize(
    ("kind", "suffix"),
    list(zip([*CURVES, "bars", "images"], [".png", ".pdf", ".svg", ".png", ".pdf", ".PNG"], strict=True)),
)
def test_every_picture_is_written_whole_and_alone(tmp_path, checkpoint, kind, suffix):
    if kind in CURVES:
        sources = [make_run(tmp_path / "a"), make_run(tmp_path / "b", method="lbgat")]
    else:
        sources = [make_json(tmp_path / "a.json", MEASURED)] if kind == "bars" else [checkpoint, "--attack", "pgd2"]
    out = tmp_path / "pictures" / f"{kind}{suffix}"
    out.parent.mkdir()
    assert figures.main([kind, *map(str, sources), "--out", str(out)]) == 0
    assert list(out.parent.iterdir()) == [out]
    assert_whole(out)


def check_failed_save(save, folder):
    """A picture that cannot be finished leaves the former one and nothing beside it."""
    out = folder / "a.png"
    out.write_bytes(b"former")

    class Broken:
        def savefig(self, path, **kwargs):
            path.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(Broken(), out)
    assert [path.name for path in folder.iterdir()] == ["a.png"] and out.read_bytes() == b"former"


def test_an_interrupted_picture_leaves_the_former_one(tmp_path):
    check_failed_save(figures.save, tmp_path)


def test_a_save_in_place_is_rejected(tmp_path):
    with pytest.raises(AssertionError):
        check_failed_save(mutant(figures.save, ("figure.savefig(aside,", "figure.savefig(path,")), tmp_path)


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    run = str(make_run(tmp_path / "run"))
    for suffix in (".svg", ".pdf"):
        twice = [tmp_path / f"{i}{suffix}" for i in (1, 2)]
        assert [figures.main(["clean", run, "--out", str(out)]) for out in twice] == [0, 0]
        assert twice[0].read_bytes() == twice[1].read_bytes()


def test_the_table_is_printed_or_written(tmp_path, capsys):
    path = str(make_json(tmp_path / "a.json", MEASURED))
    assert figures.main(["table", path]) == 0
    printed = capsys.readouterr().out
    assert figures.main(["table", path, "--out", str(tmp_path / "table.md")]) == 0
    assert (tmp_path / "table.md").read_text() == printed
    assert cells(printed)[0]["Method"] == "DYNAT"


def test_the_perturbation_is_magnified_so_that_epsilon_is_white():
    x = torch.full((3, 3, 2, 2), 0.5)
    probabilities = [torch.tensor([[0.9, 0.1]] * 3)] * 2
    x_adv = x + 0.1 * torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    figure = figures.pictures(x, x_adv, probabilities, torch.tensor([0, 1, 0]), ["cat", "dog"], "title", 0.1)
    middle = [ax.get_images()[0].get_array() for ax in figure.axes[3:6]]
    assert [float(shown.mean()) for shown in middle] == pytest.approx([0, 0.5, 1], abs=1e-6)
    below = [ax.get_xlabel().split()[0] for ax in figure.axes[:3]]
    assert below == ["✓", "✗", "✓"] and [ax.get_title() for ax in figure.axes[:3]] == ["cat", "dog", "cat"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["clean", "nothing", "--out", "a.png"], "nothing is no run directory"),
        (["clean", "empty", "--out", "a.png"], "cannot read empty/config.json"),
        (["clean", "new", "--out", "a.png"], "no finished epoch"),
        (["clean", "torn", "--out", "a.png"], "not whole JSON"),
        (["clean", "run", "--out", "a.gif"], ".png, .pdf, .svg"),
        (["clean", "run", "--out", "nowhere/a.png"], "no folder nowhere"),
        (["clean", "run", "run", "--out", "a.png"], "--labels"),
        (["overfitting", "plain", "--out", "a.png"], "plain has no val_pgd: train with --val-images"),
        (["weak-to-strong", "plain", "--out", "a.png"], "plain has no label_acc"),
        (["bars", "nothing.json", "--out", "a.png"], "cannot read nothing.json"),
        (["bars", "run/config.json", "--out", "a.png"], "has no 'trained'"),
        (["table", "run/log.jsonl"], "has no 'trained'"),
        (["images", "nothing.pt", "--out", "a.png"], "there is no file nothing.pt"),
        (["images", "run", "--out", "a.png", "--attack", "aa"], "unknown attack 'aa'"),
        ([], "required"),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "run")
    make_run(tmp_path / "new", log=[])
    make_run(tmp_path / "plain", log=[{"epoch": 1, "test_acc": 0.5}])
    with open(make_run(tmp_path / "torn") / "log.jsonl", "a") as log:
        log.write('{"epoch": 5, "te')
    before = sorted(tmp_path.rglob("*"))
    assert figures.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert sorted(tmp_path.rglob("*")) == before
