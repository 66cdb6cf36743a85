"""results/cifar10.py runs plain commands within a budget, goes on where it stopped, and its page says what was
measured and nothing else."""

import contextlib
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from cases import mutant, mutant_module
from conftest import ROOT

import evaluate
import figures
import train_dynat
from cli import UserError

sys.path.append(str(ROOT / "results"))

import cifar10
import tables


def arguments(folder, *typed, plan="short"):
    return cifar10.parser().parse_args(["--plan", plan, "--runs", str(folder), "--out", str(folder), *typed])


TRAIN, EVALUATE = train_dynat.parser(), evaluate.parser()


def typed(parser, line):
    return {flag: value for flag, value in vars(parser.parse_args(line[2:])).items() if value is not None}


def check_commands(plan_row, args):
    """Every row of a plan trains with settings that exist, into its own folder, and attacks what it trained there."""
    plan, folders = cifar10.PLANS[args.plan], set()
    for words in plan["rows"]:
        row = plan_row(plan, words, cifar10.row_name(words), args)
        own = typed(TRAIN, row.train)
        folder, _ = own.pop("out"), own.pop("resume")
        settings, _ = train_dynat.resolve(own)
        folders.add(folder)
        assert shlex.join(row.train).startswith(f"python train_dynat.py --method {words} ") and folder == row.folder
        assert settings["method"] == words.split()[0] and settings["target"] == (args.target or plan["target"])
        assert settings["epochs"] == row.epochs and settings.get("guide", args.guide) == args.guide
        assert bool(settings["ema"]) == (args.plan == "short" and words.startswith("dynat"))
        attacked = []
        for report, line in [*row.attacks.items(), *row.auto_attacks.items()]:
            flags = typed(EVALUATE, line)
            assert line[:2] == ["python", "evaluate.py"] and flags["json"] == report and flags["resume"]
            weights = "best" if flags["checkpoint"].name == "best.pt" else flags["weights"]
            assert flags["checkpoint"].parent == folder == report.parent
            attacked.append((weights, flags["attacks"], flags.get("images")))
        ways = ["last"] + ["best"] * bool(settings["val_images"]) + ["ema"] * bool(settings["ema"])
        expected = [(way, "clean,pgd20,cw", args.images) for way in ways]
        assert attacked == [*expected, *((way, "aa", args.aa_images) for way in ways)]
    assert len(folders) == len(plan["rows"])


@pytest.mark.parametrize("plan", cifar10.PLANS)
def test_every_row_of_every_plan_is_commands_that_a_person_could_type(tmp_path, plan):
    check_commands(cifar10.plan_row, arguments(tmp_path, plan=plan))
    toy = ["--data-dir", "images", "--target", "cnn", "--guide", "cnn", "--epochs", "2", "--images", "50"]
    toy += ["--aa-images", "20", "--train=--train-images 200 --batch-size 32", "--evaluate=--batch-size 50"]
    check_commands(cifar10.plan_row, arguments(tmp_path, *toy, plan=plan))
    assert cifar10.plan_rows(arguments(tmp_path, *toy, plan=plan))[0].train[-5:-3] == ["--batch-size", "32"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"--out", str(folder)', '"--out", str(args.runs)'),
        ('"best.pt" if weights == "best" else "last.pt"', '"last.pt"'),
        ('method.startswith("dynat")', '"at" in method'),
        ('["--weights", "ema"] if weights == "ema" else []', "[]"),
        ("(True, args.aa_images)", "(True, args.images)"),
        ('"--method", method, *own', '"--method", method'),
        ('if "guide" in train_dynat.options(train_dynat.METHODS[method])', "if True"),
    ],
)
def test_other_commands_are_rejected(tmp_path, old, new):
    broken = mutant(cifar10.plan_row, (old, new))
    with pytest.raises((AssertionError, UserError)):
        for plan in cifar10.PLANS:
            check_commands(broken, arguments(tmp_path, plan=plan))


def test_the_short_plan_covers_every_method_and_begins_with_ours():
    rows = cifar10.PLANS["short"]["rows"]
    assert {words.split()[0] for words in rows} == set(train_dynat.METHODS)
    assert rows[:6] == ["dynat", "dynat-inner", "dynat-inner-awp", "dynat-awp --kl-weight 0", "dynat-awp", "pgd-at"]


class Machine:
    """Runs commands without running them: an epoch takes `epoch` seconds, of `slow` methods tenfold, an attack 5; it
    stops for good when `seconds` are over. `weights` is what a network trained here is called; `fails` are the methods
    whose training does."""

    def __init__(self, seconds=math.inf, weights="w", epoch=10, slow=(), fails=()):
        self.seconds, self.clock, self.ran = seconds, 0, []
        self.weights, self.epoch, self.slow, self.fails = weights, epoch, slow, fails

    def left(self):
        return self.seconds - self.clock

    def takes(self, seconds):
        self.clock += seconds
        if self.clock >= self.seconds:
            raise cifar10.BudgetEnd

    def __call__(self, line):
        if self.left() <= 0:
            raise cifar10.BudgetEnd
        self.ran.append(shlex.join(line))
        return (self.train if "train_dynat.py" in line else self.evaluate)(line)

    def train(self, line):
        own = typed(TRAIN, line)
        out, _ = own.pop("out"), own.pop("resume")
        settings, _ = train_dynat.resolve(own)
        checkpoint = json.loads((out / "last.pt").read_text()) if (out / "last.pt").exists() else [self.weights, []]
        config = {"settings": settings, "images": {"train": 50000, "test": 10000, "val": 1000}, "commit": "c" * 40}
        (out / "config.json").write_text(json.dumps({**config, "device": "made up", "torch": "2.11"}))
        log = checkpoint[1]
        for epoch in range(len(log) + 1, settings["epochs"] + 1):
            if settings["method"] in self.fails:
                return f"error: the loss stopped being finite in epoch {epoch} (exit status 2)"
            seconds = self.epoch * (10 if settings["method"] in self.slow else 1)
            self.takes(seconds)
            log.append({"epoch": epoch, "seconds": seconds, "images_per_second": 50000 / seconds, "adv_acc": 0.4,
                        "test_acc": 0.7, "guide_test_acc": 0.8, "label_acc": 0.3 + 0.1 * epoch})  # fmt: skip
            (out / "last.pt").write_text(json.dumps(checkpoint))
            (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        return None

    def evaluate(self, line):
        flags = typed(EVALUATE, line)
        weights, log = json.loads(flags["checkpoint"].read_text())
        self.takes(5)
        results = []
        for attack in flags["attacks"].split(","):
            n = flags.get("images", 10000)
            row = {"network": "target", "attack": attack, "n": n, "correct": n // 2, "accuracy": 0.5, "seconds": 1.0}
            results.append({**row, "interval": [0.49, 0.51], "epsilon": 8 / 255, "step_size": 2 / 255})
        report = {"command": shlex.join(line), "commit": "c" * 40 + "+", "device": "made up", "of": weights}
        trained = {"epoch": len(log), "settings": {}}
        flags["json"].write_text(json.dumps({**report, "trained": trained, "results": results}))
        return None


ROWS = ("dynat", "dynat-awp-kl-weight-0", "dynat-awp", "pgd-at")


def some_rows(folder, *more):
    return cifar10.plan_rows(arguments(folder, "--epochs", "3", "--data-dir", "images", "--rows", *ROWS, *more))


def found(rows):
    return {row.folder.name: cifar10.read(row.folder) for row in rows}


def check_any_cut(measure, folder):
    """Stopped at any moment and started again, once or at every turn, it ends in the same files as in one go, having
    trained no epoch twice and repeated only the command that was stopped."""
    rows, whole = [some_rows(folder)[i] for i in (0, 3)], Machine()
    measure(rows, whole, whole.left)
    expected, ran = found(rows), len(whole.ran)
    assert ran == 2 * 1 + 3 * 2 == len(set(whole.ran))
    assert [line.split()[1] for line in whole.ran[:4]] == ["train_dynat.py", *["evaluate.py"] * 2, "train_dynat.py"]
    assert [" aa " in line for line in whole.ran] == [False] * 5 + [True] * 3
    for cut in range(1, whole.clock + 1, 5):
        shutil.rmtree(folder)
        for seconds in (cut, math.inf):
            machine = Machine(seconds)
            try:
                measure(rows, machine, lambda: math.inf)
            except cifar10.BudgetEnd:
                before = machine
        assert found(rows) == expected, cut
        assert len(before.ran) + len(machine.ran) == ran + 1 and before.clock + machine.clock <= whole.clock + 10
        assert set(before.ran) & set(machine.ran) == {before.ran[-1]} == {machine.ran[0]}


def test_stopped_at_any_moment_it_goes_on_to_the_same_figures(tmp_path):
    check_any_cut(cifar10.measure, tmp_path / "runs")


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("measure", 'if not (row.folder / "last.pt").exists()', "if True"),  # each row anew
        ("trained", ">= row.epochs", ">= 1"),  # a run cut short is taken for a whole one
        ("measure", "if not trained(row):", "if True:"),  # trained again
        ("attack", "not report.exists() and ", ""),  # attacked again
        ("measure", "attack(row, row.attacks, run)", "attack(row, {**row.attacks, **row.auto_attacks}, run)"),
    ],
)
def test_a_script_that_repeats_or_forgets_work_is_rejected(tmp_path, monkeypatch, function, old, new):
    monkeypatch.setattr(cifar10, function, mutant(getattr(cifar10, function), (old, new)))
    with pytest.raises((AssertionError, UnboundLocalError)):
        check_any_cut(cifar10.measure, tmp_path / "runs")


def check_lost_weights(measure, folder):
    """A row with its evaluations is left alone without its weights; one that lost them before is trained anew, and all
    its figures are of the new network."""
    rows, first = some_rows(folder), Machine(52)  # dynat done, the second row's training in its first epoch
    with pytest.raises(cifar10.BudgetEnd):
        measure(rows, first, lambda: math.inf)
    with pytest.raises(cifar10.BudgetEnd):
        measure(rows, machine := Machine(26), lambda: math.inf)  # trained, and attacked once of twice
    assert len(machine.ran) == 3 and len(cifar10.read(rows[1].folder)["evaluations"]) == 1
    for row in rows:
        (row.folder / "last.pt").unlink(missing_ok=True)
    second = Machine(weights="new")
    measure(rows, second, second.left)
    reports = [cifar10.read(row.folder)["evaluations"] for row in rows]
    assert {name: report["of"] for name, report in reports[0].items()} == dict.fromkeys(
        ["last-clean-pgd20-cw", "ema-clean-pgd20-cw"], "w"
    )
    assert len(reports[1]) == 4 and {report["of"] for report in reports[1].values()} == {"new"}


def test_weights_are_needed_only_until_they_are_attacked(tmp_path):
    check_lost_weights(cifar10.measure, tmp_path / "runs")


@pytest.mark.parametrize(
    "replacements",
    [
        [("shutil.rmtree(row.folder, ignore_errors=True)", "None")],
        [("all(report.exists() for", "any(report.exists() for")],
        [("or all(report.exists() for report in row.attacks or row.auto_attacks)", "")],
    ],
)
def test_figures_of_two_networks_in_one_row_are_rejected(tmp_path, replacements):
    with pytest.raises(AssertionError):
        check_lost_weights(mutant(cifar10.measure, *replacements), tmp_path / "runs")


def check_foreign_folder(measure, folder):
    """What lies in a row's folder and is no row's stays."""
    rows, machine = some_rows(folder), Machine()
    rows[0].folder.mkdir(parents=True)
    (rows[0].folder / "mine.txt").write_text("precious")
    measure(rows, machine, machine.left)
    assert (rows[0].folder / "mine.txt").exists() and cifar10.read(rows[0].folder)["log"]


def test_a_folder_of_somebody_elses_is_not_removed(tmp_path):
    check_foreign_folder(cifar10.measure, tmp_path / "a")
    with pytest.raises(AssertionError):
        check_foreign_folder(mutant(cifar10.measure, ("if read(row.folder):", "if True:")), tmp_path / "b")


def check_budget(folder, capsys):
    """A row begins only where it fits, by the seconds of its own method, else of the slowest; the first always does;
    the time left goes to AutoAttack."""

    def call(seconds):
        machine = Machine(seconds, slow=["dynat-awp"])  # an epoch of it takes 100 s, of the others 10, an attack 5
        with contextlib.suppress(cifar10.BudgetEnd):
            cifar10.measure(rows, machine, machine.left)
        return [len(cifar10.read(row.folder).get("evaluations", "-")) for row in rows], capsys.readouterr().out

    rows = some_rows(folder)
    assert call(150) == ([2, 0, 1, 1], "")  # "-", never begun, has length 1
    done, said = call(250)
    assert done == [4, 4, 1, 1]
    why = "(100 s an epoch of dynat-awp-kl-weight-0"
    assert f"dynat-awp is not begun: 40 s are left, it takes about 306 s {why})\n" in said
    assert f"pgd-at is not begun: 40 s are left, it takes about 303 s {why}, the slowest so far)\n" in said
    done, said = call(120)
    assert done == [4, 4, 0, 1] and said == ""
    done, said = call(math.inf)
    assert done == [4, 4, 4, 2] and said == ""


def test_a_row_begins_only_where_it_fits(tmp_path, capsys):
    check_budget(tmp_path / "runs", capsys)


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("measure", "begun and needed > left()", "needed > left()"),
        ("measure", "begun and needed > left()", "False"),
        (
            "measure",
            "                    continue\n                if read",
            "                    break\n                if read",
        ),
        ("seconds_needed", "max(same or epochs, key=epochs.get)", "min(epochs, key=epochs.get)"),
        ("seconds_needed", "row.epochs * epochs[slowest]", "epochs[slowest]"),
        ("seconds_needed", " + len(row.attacks) * max(attacks)", ""),
        ("seconds_needed", "if not evaluate.AUTO_ATTACK", "if evaluate.AUTO_ATTACK"),
    ],
)
def test_a_budget_not_kept_is_rejected(tmp_path, capsys, monkeypatch, function, old, new):
    monkeypatch.setattr(cifar10, function, mutant(getattr(cifar10, function), (old, new)))
    with pytest.raises(AssertionError):
        check_budget(tmp_path / "runs", capsys)


def check_failed_row(folder):
    """A row that fails is left with its command's line, which the page shows; the others are measured; it is not tried
    again."""
    rows, machine = some_rows(folder / "runs"), Machine(fails=["dynat-awp"])
    for _ in range(2):
        cifar10.measure(rows, machine, machine.left)
    cifar10.gather(arguments(folder / "runs"))
    assert len(machine.ran) == 1 + 4 + 1 + 1 + 1 + 2
    shown = {row["row"]: row["note"] for row in cells((folder / "runs/cifar10-short.md").read_text()) if row["note"]}
    assert list(shown) == ["dynat-awp-kl-weight-0", "dynat-awp"]
    for note in shown.values():
        assert note.startswith("failed: python train_dynat.py --method dynat-awp")
        assert note.endswith(": error: the loss stopped being finite in epoch 1 (exit status 2)")


def cells(text, number=0):
    """The rows of a page's n-th table, by heading; the paper's columns, named twice, as 'paper: ...'."""
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in blocks[number].split("\n")]
    headings = [f"paper: {name}" if name in lines[0][:i] else name for i, name in enumerate(lines[0])]
    return [dict(zip(headings, line, strict=True)) for line in lines[2:]]


def test_a_failed_row_is_said_and_the_next_one_begins(tmp_path):
    check_failed_row(tmp_path)


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("measure", '"failed" in read(row.folder) or all', "all"),
        ("succeeds", "if failure:", "if False:"),
        ("succeeds", "return not failure", "return True"),
        ("page", '"failed" in record', "False"),
    ],
)
def test_a_failure_that_is_hidden_or_repeated_is_rejected(tmp_path, monkeypatch, function, old, new):
    if function == "page":
        monkeypatch.setattr(cifar10, "page", mutant_module(tables, (old, new)).page)
    else:
        monkeypatch.setattr(cifar10, function, mutant(getattr(cifar10, function), (old, new)))
    with pytest.raises((AssertionError, FileNotFoundError)):
        check_failed_row(tmp_path)


RESULTS = {
    "plan": "short",
    "rows": {
        "dynat-awp-kl-weight-0": {
            "row": "dynat-awp --kl-weight 0",
            "train": "python train_dynat.py --method dynat-awp --kl-weight 0",
            "config": {
                "settings": {"dataset": "folder", "target": "resnet18", "epochs": 2, "seed": 1},
                "images": {"train": 49000, "val": 1000, "test": 10000},
                "commit": "0123456789abcdef+",
                "device": "A GPU",
                "torch": "2.11",
            },
            "log": [
                {"epoch": 1, "seconds": 30.0, "images_per_second": 1633.0, "label_acc": 0.31, "adv_acc": 0.2,
                 "test_acc": 0.4, "guide_test_acc": 0.5, "val_pgd": 0.35},
                {"epoch": 2, "seconds": 10.0, "images_per_second": 4900.0, "label_acc": 0.52, "adv_acc": 0.3,
                 "test_acc": 0.6, "guide_test_acc": 0.65, "val_pgd": 0.25},
            ],
            "evaluations": {
                f"{name}-{attack}": {
                    "command": f"python evaluate.py --attacks {attack}", "commit": "fedcba9876543210",
                    "device": "B GPU", "trained": {"epoch": 2},
                    "results": [{"attack": attack, "n": n, "correct": hits, "accuracy": hits / n, "seconds": 1.0,
                                 "epsilon": 8 / 255, "step_size": 2 / 255, "interval": evaluate.wilson(hits, n)}],
                }
                for name, attack, n, hits in (("last", "pgd20", 10000, 4321), ("ema", "pgd20", 10000, 4567),
                                              ("last", "aa", 1000, 399))
            },
        }
    },
}  # fmt: skip


def check_page(page):
    text = page(RESULTS, cifar10.PLANS["short"])
    assert text.startswith("# CIFAR-10, JPEG copy: plan short\n")
    assert "target: resnet18; epochs: 2; seed: 1." in text and "epsilon 8/255, step size 2/255" in text
    rows = cells(text)
    assert [row["row"] for row in rows if row["PGD-20"]] == ["dynat-awp-kl-weight-0"] * 2 and len(rows) == 23
    last, ema = rows[3:5]
    assert (last["weights"], last["epoch"], last["PGD-20"], last["AA"]) == (
        "last", "2", "43.2 % [42.2, 44.2]", "39.9 % [36.9, 43.0]",
    )  # fmt: skip
    assert (last["n"], last["commit"], last["device"]) == ("10,000 (PGD-20); 1,000 (AA)", "fedcba98", "B GPU")
    assert (ema["weights"], ema["PGD-20"], ema["AA"], ema["n"]) == ("ema", "45.7 % [44.7, 46.6]", "", "10,000")
    assert (last["Clean"], last["C&W"], last["note"]) == ("", "", "")
    assert (last["paper: table"], last["paper: Clean"], last["paper: AA"]) == ("1, wrn34-10", "90.27", "52.10")
    assert not any(value for name, value in ema.items() if name.startswith("paper"))
    assert rows[0]["row"] == "dynat" and rows[0]["paper: PGD-20"] == "51.78" and rows[0]["PGD-20"] == ""
    (log,) = cells(text, 1)
    assert (log["seconds per epoch (median)"], log["right dynamic labels: first epoch"], log["paper: last epoch"]) == (
        "20.0", "31.0%", "25.0 % [22.4, 27.8]",
    )  # fmt: skip
    assert (log["last epoch"], log["epochs with the guide ahead"], log["target, clean test"]) == (
        "52.0%", "2 of 2", "60.0 % [59.0, 61.0]",
    )  # fmt: skip
    assert (log["held out, PGD-10: best epoch"], log["accuracy"]) == ("1", "35.0 % [32.1, 38.0]")
    assert (log["commit"], log["device"]) == ("01234567+", "A GPU")
    commands = text.split("```")[1].strip().splitlines()
    assert commands[0] == RESULTS["rows"]["dynat-awp-kl-weight-0"]["train"] and len(commands) == 4


def test_the_page_says_what_was_measured_and_the_paper_stands_apart():
    check_page(tables.page)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('100 * rows[attack]["accuracy"], rows[attack]["n"]', '100 * rows[attack]["interval"][0], rows[attack]["n"]'),
        ('IN_PAPER.get(words, words)', "words"),
        ('note, theirs = "", [""] * len(theirs)', 'note = ""'),
        ('"folder": "CIFAR-10, JPEG copy"', '"folder": "CIFAR-10"'),
        ('row["guide_test_acc"] > row["test_acc"]', 'row["guide_test_acc"] < row["test_acc"]'),
        ('best = max(', 'best = min('),
        ('("+" if known.endswith("+") else "")', '""'),
        ("statistics.median(row['seconds']", "min(row['seconds']"),
    ],
)  # fmt: skip
def test_another_page_is_rejected(old, new):
    with pytest.raises(AssertionError):
        check_page(mutant_module(tables, (old, new)).page)


def test_before_anything_is_measured_the_page_is_blank():
    rows = cells(tables.page({"plan": "short", "rows": {}}, cifar10.PLANS["short"]))
    assert len(rows) == len(cifar10.PLANS["short"]["rows"])
    assert not any(row[name] for row in rows for name in ("Clean", "PGD-20", "C&W", "AA", "n", "commit", "device"))


def check_restored(restore, folder):
    """What was gathered becomes the same files again, in a folder without weights that figures.py reads."""
    rows, machine = some_rows(folder / "a"), Machine(55, fails=["dynat-awp"])
    with pytest.raises(cifar10.BudgetEnd):  # in the second epoch of the last row
        cifar10.measure(rows, machine, lambda: math.inf)
    cifar10.gather(arguments(folder / "a"))
    records = json.loads((folder / "a/cifar10-short.json").read_text())["rows"]
    assert list(records) == ["dynat", "dynat-awp-kl-weight-0", "dynat-awp", "pgd-at"]
    for name, record in records.items():
        restore(record, folder / "b" / name)
        assert cifar10.read(folder / "b" / name) == record == cifar10.read(folder / "a/short" / name)
    assert figures.read_run(folder / "b/dynat").log == records["dynat"]["log"]


def test_run_folders_are_restored_from_what_was_gathered(tmp_path):
    check_restored(cifar10.restore, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"train", "failed")', '"train")'), ('if "log" in record', 'if "weights" in record')],
)
def test_a_part_not_restored_is_rejected(tmp_path, old, new):
    with pytest.raises((AssertionError, UserError)):
        check_restored(mutant(cifar10.restore, (old, new)), tmp_path)


@pytest.mark.parametrize("flags", [["--train=--lr 0.03"], ["--images", "50"], ["--guide", "cnn"]])
def test_figures_of_other_flags_are_not_mixed(tmp_path, flags):
    rows, machine = some_rows(tmp_path), Machine()
    cifar10.measure(rows, machine, machine.left)
    for row in some_rows(tmp_path):
        cifar10.check_same(row)
    with pytest.raises(UserError, match="is of another command, 'python "):
        for row in some_rows(tmp_path, *flags):
            cifar10.check_same(row)
    for row in some_rows(tmp_path, "--attacks", "clean,pgd20,cw,aa-fast"):  # more of the same network
        cifar10.check_same(row)


def check_execute(execute, folder):
    """A command that fails is told by its last line; at the end of the budget the one that runs is told to end and may
    still save."""
    kept = []
    with cifar10.alone(folder) as lock:
        run = lambda program, seconds: execute(["python", "-c", program], lambda: seconds, lock, lambda: kept.append(1))
        assert run("print(1)", 60) is None
        failure = run("import sys; print('warning: a', file=sys.stderr); sys.exit('error: loss')", 60)
        assert failure == "error: loss (exit status 1)"
        saving = "import signal, sys, time; from pathlib import Path\n"
        saving += f"signal.signal(15, lambda *_: [Path({str(folder / 'saved')!r}).touch(), sys.exit(143)])\n"
        saving += "time.sleep(60)"
        with pytest.raises(cifar10.BudgetEnd):
            run(saving, 3)
        assert (folder / "saved").exists()
        with pytest.raises(cifar10.BudgetEnd):
            run("print(1)", 0)
    assert len(kept) == 3


def test_a_command_ends_with_the_budget_and_says_why_it_failed(tmp_path, capfd):
    check_execute(cifar10.execute, tmp_path)
    assert "$ python -c 'print(1)'\n1\n" in capfd.readouterr().out


def test_a_command_that_outlives_its_call_keeps_the_others_out(tmp_path):
    with cifar10.alone(tmp_path) as lock:
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    with pytest.raises(UserError, match="a command that outlived it"), cifar10.alone(tmp_path):
        pass
    orphan.communicate(b"\n")
    with cifar10.alone(tmp_path):
        pass


def test_with_no_time_it_restores_the_runs_and_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    former = signal.getsignal(signal.SIGTERM)
    (tmp_path / "cifar10-short.json").write_text(json.dumps(RESULTS))
    typed = ["--plan", "short", "--out", str(tmp_path), "--runs", str(tmp_path / "runs"), "--budget", "0"]
    assert cifar10.main(typed) == 0
    signal.signal(signal.SIGTERM, former)
    assert json.loads((tmp_path / "cifar10-short.json").read_text()) == json.loads(json.dumps(RESULTS))
    check_page(lambda *_: (tmp_path / "cifar10-short.md").read_text())
    run = str(tmp_path / "runs/short/dynat-awp-kl-weight-0")
    assert figures.main(["overfitting", run, "--dataset-name", "CIFAR-10, JPEG copy", "--out", f"{run}.svg"]) == 0
    assert "written: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--plan", "long"], "invalid choice"),
        (["--plan", "short", "--rows", "dynat", "sgd"], "no row sgd"),
        (["--plan", "wrn", "--train=--kl-wieght 1"], "unrecognized arguments: --kl-wieght 1"),
        (["--plan", "wrn", "--train=--label-smoothing 0.1"], "does not use --label-smoothing"),
        (["--plan", "wrn", "--evaluate=--batch-size 0"], "out of range"),
        (["--plan", "wrn", "--attacks", "clean,pdg20"], "unknown attack"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(tmp_path, monkeypatch, capsys, typed, says):
    monkeypatch.chdir(ROOT)
    assert cifar10.main([*typed, "--runs", str(tmp_path), "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert not list(tmp_path.iterdir())


def test_every_command_of_the_results_page_is_a_command(monkeypatch):
    monkeypatch.chdir(ROOT)  # where they are typed
    lines = [line.split()[1:2] + shlex.split(line)[2:] for line in (ROOT / "results/README.md").read_text().splitlines()
             if line.startswith("    python ")]  # fmt: skip
    plans = set()
    for script, *argv in lines:
        if script == "figures.py":
            figures.parser().parse_args(argv)
        else:
            assert script == "results/cifar10.py"
            args = cifar10.parser().parse_args(argv)
            plans.add(args.plan)
            assert cifar10.plan_rows(args)
    assert plans == set(cifar10.PLANS)
