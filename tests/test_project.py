"""What README and docs promise: their commands run, their story is true, what they name exists, no flag is idle."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from cases import settings_of
from conftest import ROOT
from test_lifting import imported

import evaluate
import figures
import train_dynat
from settings import make_parser

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
TRAIN = "python train_dynat.py --dataset tiny"
ATTACK = "python evaluate.py runs/dynat-tiny-cnn-s1/last.pt --network target,guide"
SMALL = "--train-images 60 --epochs 1 --steps 1 --out runs/dynat-tiny-cnn-s1"


def commands(text):
    """Whole lines in blocks of code, and commands with arguments within a sentence."""
    lines = re.findall(r"^    ((?:python|torchrun) .*\.py.*)$", text, re.MULTILINE)
    return lines + re.findall(r"`(python \S+\.py [^`]+)`", text)


def check_command(line):
    """Its script exists, and so do its flags and the names given to them."""
    words = shlex.split(line.replace("FLAGS", "").replace("--help", "").replace("NAME", "trades"))
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))  # torchrun's own flags stand before it
    script, argv = words[at], words[at + 1 :]
    assert (ROOT / script).exists(), script
    if script == "train_dynat.py":
        settings_of(" ".join(argv))
    elif script in ("evaluate.py", "figures.py") and argv:
        {"evaluate.py": evaluate, "figures.py": figures}[script].parser().parse_args(argv)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_a_command(page):
    for line in commands(PAGES[page]):
        check_command(line)


def test_every_row_of_the_papers_tables_has_its_flags():
    counts = []
    for section in re.findall(r"^## Table \d.*?(?=^## )", PAGES["docs/reproduce.md"], re.MULTILINE | re.DOTALL):
        (command,) = [line.replace("FLAGS", "") for line in commands(section) if "FLAGS" in line]
        rows = re.findall(r"^\| .+ \| `(--method .*)` \|$", section, re.MULTILINE)
        runs = {json.dumps(settings_of((command + flags).split(maxsplit=2)[2])) for flags in rows}
        assert len(runs) == len(rows), "two rows of a table are one run"
        counts.append(len(rows))
    assert counts == [11, 8, 4, 10]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_test_that_a_page_names_exists_and_no_row_has_an_empty_cell(page):
    text = PAGES[page]
    for link in re.findall(r"\]\((?!https:)([^)]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for file in re.findall(r"`([\w/]+\.(?:py|md|toml))`", text):
        assert (ROOT / file).exists(), file
    tests = "".join(file.read_text() for file in ROOT.glob("tests/test_*.py"))
    for name in re.findall(r"`(test_\w+_\w+)`", text):
        assert f"def {name}(" in tests, name
    for rows in re.findall(r"-\|\n((?:\|.*\n)+)", text):
        assert not re.search(r"\| *\|", rows), rows


def test_the_quick_start_on_a_few_images_ends_by_saying_what_to_run_next_and_that_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_dynat.main(shlex.split(f"{TRAIN} {SMALL}")[2:]) == 0
    first, *_, picture, attack = capsys.readouterr().out.splitlines()
    assert (first, attack) == ("no NVIDIA GPU found: training on the CPU", ATTACK)
    assert figures.main(shlex.split(picture)[2:]) == 0
    assert evaluate.main(shlex.split(f"{attack} --images 20")[2:]) == 0


def test_a_files_head_names_what_it_imports_of_the_project_and_no_imports_make_a_circle():
    sources = {file.stem: file.read_text() for file in ROOT.glob("*.py")}
    imports = {name: imported(source) & {*sources, "variants"} for name, source in sources.items()}
    variants = [imported(file.read_text()) for file in ROOT.glob("variants/*.py")]
    TopologicalSorter({**imports, "variants": set.union(*variants)}).prepare()  # raises a CycleError
    for name, source in sources.items():
        head = re.split(r"^(?:import|from) ", source, maxsplit=1, flags=re.MULTILINE)[0]
        (said,) = re.findall(r"\bit imports (.*?)\.|needs nothing but torch", head, re.DOTALL | re.IGNORECASE)
        assert set(re.findall(r"\w+", said)) & {*sources, "variants"} == imports[name], name


class Recorder(dict):
    """A dict that adds each key that is asked for to the set `read`."""

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


def test_every_flag_is_read_by_something(tmp_path, monkeypatch):
    train, Recorder.read = train_dynat.train, set()
    monkeypatch.setattr(train_dynat, "train", lambda settings, *rest: train(Recorder(settings), *rest))
    monkeypatch.chdir(tmp_path)
    assert train_dynat.main(shlex.split(f"{TRAIN} {SMALL}")[2:]) == 0
    read = Recorder.read.union(*(method["step_settings"] for method in train_dynat.METHODS.values()))
    for file in ("train_dynat.py", "settings.py"):
        read |= set(re.findall(r'(?:where|settings)\["(\w+)', (ROOT / file).read_text()))
    used = set(re.findall(r"\bargs\.(\w+)", (ROOT / "evaluate.py").read_text()))
    training, _ = make_parser(train_dynat.METHODS, "")
    for parser, known in ((training, read), (evaluate.parser(), used)):
        assert {action.dest for action in parser._actions} - known <= {"help"}


@pytest.mark.slow
def test_the_quick_start_tells_the_papers_story_and_prints_what_the_readme_shows(tmp_path):
    folder, printed = tmp_path / "copy", ""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "data", "runs", "tests"))
    for line in (TRAIN, f"{ATTACK} --json report.json"):
        command, one_thread = [sys.executable, *shlex.split(line)[1:]], {**os.environ, "OMP_NUM_THREADS": "1"}
        printed += subprocess.check_output(command, cwd=folder, env=one_thread, text=True)
    results = json.loads((folder / "report.json").read_text())["results"]
    accuracy = {(row["network"], row["attack"]): row["accuracy"] for row in results}
    assert min(accuracy["guide", "clean"], accuracy["target", "clean"]) > 0.9
    assert accuracy["target", "pgd20"] - 0.3 > accuracy["guide", "pgd20"] < 0.5
    log = [json.loads(row) for row in (folder / "runs/dynat-tiny-cnn-s1/log.jsonl").read_text().splitlines()]
    assert log[0]["label_acc"] + 0.2 < log[-1]["label_acc"] < 0.99
    shape = lambda text: {" ".join(re.sub(r"[\d.]+", "0", line).split()) for line in text.splitlines()}
    shown = "".join(re.findall(r"^```text\n(.*?)^```", PAGES["README.md"], re.DOTALL | re.MULTILINE))
    assert shown and shape(shown.replace("...\n", "")) <= shape(printed)
