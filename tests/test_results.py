"""results/run.py runs plain commands, goes on where it stopped, and keeps what was measured."""

import csv
import re
import shlex
import sys

import pytest
from cases import settings_of
from conftest import ROOT

import evaluate
import figures
import train_dynat
from checkpoints import lock
from settings import parse

sys.path.append(str(ROOT / "results"))

import run

# In the place of train_dynat.py and of evaluate.py: notes its flags in "calls", fails if told to, leaves the files.
FAKE = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
after = lambda flag: Path(words[words.index(flag) + 1])
with open("calls", "a") as calls:
    print(*words, file=calls)
if Path("stop").exists() and Path("stop").read_text() in words:
    sys.exit("error: told to fail")
settings = {"method": "dynat", "data_dir": str(Path("images").resolve())}
if "--out" in words:
    after("--out").mkdir(parents=True, exist_ok=True)
    config = {"settings": settings, "images": {"test": 600}}
    (after("--out") / "config.json").write_text(json.dumps(config))
    (after("--out") / "log.jsonl").write_text("")
    (after("--out") / "weights.pt").write_bytes(bytes(10 if "cnn" in words else 1_000_001))
else:
    row = {"network": "target", "attack": str(after("--attacks")), "n": 10, "correct": 5, "accuracy": 0.5}
    about = {"checkpoint": words[0], "sha256": words[0], "weights": "last", "results": [row]}
    after("--json").write_text(json.dumps({**about, "trained": {"epoch": 1, "settings": settings}}))
    after("--json").with_suffix(".npz").write_bytes(b"matrix")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Where the runner works, with scripts of the two names. Returns (the folder, a function: the calls so far)."""
    for name in ("train_dynat.py", "evaluate.py"):
        (tmp_path / name).write_text(FAKE)
    (tmp_path / "calls").touch()
    monkeypatch.setattr(run, "ROOT", tmp_path)
    return tmp_path, lambda: (tmp_path / "calls").read_text().splitlines()


def exit_status(*words):
    try:
        return run.main(list(words))
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("plan", run.PLANS)
def test_every_row_is_commands_that_a_person_could_type(plan, capsys):
    typed = ["--dataset", "cifar100", "--guide", "cnn", "--batch-size", "64", "--seed", "7"] if plan != "paper" else []
    assert exit_status(plan, "--list", "--", *typed) == 0
    runs = []
    for line in map(shlex.split, capsys.readouterr().out.splitlines()):
        if line[1] == "train_dynat.py":
            settings, (_, first, _) = settings_of(shlex.join(line[2:])), parse(line[2:], train_dynat.METHODS)
            runs.append(first["out"])
            assert first["resume"] and settings["batch_size"] == (64 if typed else 128)
            assert plan != "labels" or settings["seed"] != 7  # what sets a row apart is the row's
        else:
            args = evaluate.parser().parse_args(line[2:])
            assert args.checkpoint.parent == args.json.parent == runs[-1] and args.resume
            assert args.checkpoint.name == "last.pt" or settings["val_images"]
    assert len(set(runs)) == len(runs) == len(run.read_plan(plan)[2])


def test_the_overfitting_rows_have_equal_settings():
    _, shared, rows = run.read_plan("overfitting")
    commands = [run.row_commands("overfitting", shared.split(), row, "", "run") for row in rows.values()]
    first, second, pgd_at = (settings_of(" ".join(row["train"][2:])) for row in commands)
    assert {name for name in first if first[name] != second[name]} == {"static_labels"}
    assert {name for name in pgd_at if first[name] != pgd_at[name]} == {"method"}
    assert set(commands[-1]) == {"train", "last", "best"}


def test_a_stopped_plan_goes_on_and_a_finished_one_runs_nothing(project):
    folder, calls = project
    words = ["methods", "--rows", "pgd-at", "dynat", "--out", "kept", "--", "--target", "cnn", "--data-dir=images"]
    (folder / "stop").write_text("aa")  # the last command of pgd-at
    assert exit_status(*words) == 1 and len(calls()) == 3 + 2
    assert sorted(path.parent.name for path in folder.glob("kept/methods/*/last.json")) == ["dynat", "pgd-at"]
    assert not list(folder.glob("kept/methods/*/aa.*"))
    (folder / "stop").unlink()
    assert exit_status(*words) == 0 and len(calls()) == 5 + 2
    assert "--attacks aa --images 600" in calls()[-1]  # as many as there are
    before = sorted(folder.rglob("*"))
    assert exit_status(*words, "--target", "cnn") == 0 and len(calls()) == 7 and sorted(folder.rglob("*")) == before
    kept = folder / "kept" / "methods" / "pgd-at"
    names = sorted(path.name for path in kept.iterdir())
    assert " ".join(names) == "aa.json aa.npz commands.txt config.json last.json last.npz log.jsonl weights.pt"
    assert str(folder) not in (kept / "config.json").read_text() + (kept / "last.json").read_text()
    assert (folder / "kept" / "methods.md").read_text().count("\n| DYNAT, ") == 2
    assert exit_status(*words, "--epochs", "3") == 1 and len(calls()) == 7  # other flags: other results


def test_a_failed_or_busy_row_leaves_the_others_and_large_weights_are_not_kept(project, capsys):
    (project[0] / "stop").write_text("aa")
    assert exit_status("methods", "--rows", "pgd-at") == 1
    assert "| DYNAT |" in (project[0] / "results" / "methods.md").read_text()  # what was measured before it failed
    (project[0] / "stop").write_text("dynat")
    assert exit_status("tiny", "--rows", "dynat") == 1
    kept = project[0] / "results" / "tiny"
    (kept / "sat").mkdir()
    with lock(kept / "sat", "busy"):
        assert exit_status("tiny", "--rows", "sat", "trades") == 1
    err = capsys.readouterr().err
    assert "dynat: exit status 1 of python train_dynat.py" in err and "sat: another call is at work on it" in err
    assert (kept / "trades" / "last.json").exists() and not (kept / "trades" / "weights.pt").exists()


def test_a_plan_may_be_a_text_file_and_its_attacks_may_be_typed(project, capsys):
    folder, calls = project
    plan = folder / "mine.txt"
    plan.write_text("--method trades --epsilon 8/255\n\n--method pgd-at --seed 2\n")
    assert exit_status(str(plan), "--attacks", "clean,pgd50", "--", "--guide", "cnn", "--target", "cnn") == 0
    assert calls()[0].startswith("--target cnn --method trades --epsilon 8/255 --out ")
    assert len(calls()) == 4 and "--attacks clean,pgd50 " in calls()[1]
    assert (folder / "results" / "mine" / "pgd-at-seed-2" / "last.json").exists()
    plan.write_text("--seed 1\n")
    assert exit_status(str(plan)) == exit_status("other.txt") == exit_status("tiny", "--attacks", "pdg20") == 2
    assert len(capsys.readouterr().err.splitlines()) == 3 and len(calls()) == 4


def test_the_real_scripts_fill_a_row(tmp_path, monkeypatch):
    scripts = {"train_dynat.py": train_dynat.main, "evaluate.py": evaluate.main}
    monkeypatch.setattr(run, "execute", lambda command: scripts[command[1]](command[2:]))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert exit_status("tiny", "--rows", "pgd-at", "--", "--train-images", "100", "--epochs", "1") == 0
    assert "| PGD-AT | 1 |" in (tmp_path / "results" / "tiny.md").read_text()


def test_the_page_shows_what_its_commands_print_and_what_holms_correction_leaves(tmp_path, monkeypatch):
    page, printed = (ROOT / "results" / "README.md").read_text(), set()
    monkeypatch.chdir(ROOT)
    for command in re.findall(r"figures\.py (compare .*)", page):
        assert figures.main([*command.split(), "--out", str(tmp_path / "out.csv")]) == 0
        for row in csv.DictReader((tmp_path / "out.csv").read_text().splitlines()):
            a, b, difference, low, high = (float(row[name]) for name in ("A", "B", "B - A", "low", "high"))
            printed |= {f"{a:.2f} → {b:.2f}", f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"}
    shown = re.findall(r"\d+\.\d\d → \d+\.\d\d|[+-]\d+\.\d\d \[.+?\]", page)
    assert set(shown) <= printed
    answers = re.findall(r"\| ([\d.e-]+) \| (\*\*\w+\*\*|\w+ †|cannot tell) \|$", page, re.MULTILINE)
    answers = sorted((float(p), answer) for p, answer in answers)
    passed = [p * (len(answers) - rank) <= 0.05 for rank, (p, _) in enumerate(answers)]
    kept = passed.index(False)
    assert ["**" in answer for _, answer in answers] == [rank < kept for rank in range(len(answers))]
    assert f"hold {len(answers)} comparisons" in page and f"leaves {kept}:" in page


def test_the_papers_column_all_is_the_mean_of_its_attacks():
    """A slip in copying a row of Table 1 shows here: the paper cuts the mean off after two digits, or rounds it."""
    rows = list(csv.DictReader((ROOT / "results" / "paper.csv").read_text().splitlines()))
    assert len(rows) == 33 and len([row for row in rows if row["all"]]) == 11
    for row in rows[:11]:
        assert abs(sum(float(row[attack]) for attack in figures.ALL) / 5 - float(row["all"])) < 0.01, row
