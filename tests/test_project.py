"""What the README promises: its commands run, its story is true, each module works alone, no flag is idle."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
from conftest import ROOT

import evaluate
import figures
import train_dynat
from cli import UserError

README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in README.splitlines() if re.match(r"    (python|pip|pytest|torchrun)\b", line)]


@pytest.fixture(scope="session")
def quick_start(tmp_path_factory):
    """The README's first two commands, typed in a copy of the project. Returns the folder and what they printed."""
    folder = tmp_path_factory.mktemp("newcomer")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    if (ROOT / "variants").is_dir():
        shutil.copytree(ROOT / "variants", folder / "variants")
    train, attack = (next(line for line in COMMANDS if name in line) for name in ("train_dynat.py", "evaluate.py"))
    outputs, one_thread = [], {**os.environ, "OMP_NUM_THREADS": "1"}
    for line in (train, attack + " --attacks clean,pgd20 --json report.json"):
        words = shlex.split(line)
        done = subprocess.run([sys.executable, *words[1:]], cwd=folder, env=one_thread, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    return folder, outputs


def test_the_quick_start_ends_by_saying_what_to_run_next(quick_start):
    _, (printed, _) = quick_start
    attack = next(line for line in COMMANDS if "evaluate.py" in line)
    assert printed.rstrip().splitlines()[-1] == attack


def check_story(log, figures):
    """The guide ends accurate and falls to PGD-20, the target stays accurate and stands, labels grow stronger."""
    share = {(row["network"], row["attack"]): row["accuracy"] for row in figures}
    assert share["guide", "clean"] > 0.9 and share["target", "clean"] > 0.85
    assert share["guide", "pgd20"] < 0.5
    assert share["target", "pgd20"] > share["guide", "pgd20"] + 0.3
    label_acc = [row["label_acc"] for row in log]
    rises = sum(later > earlier for earlier, later in pairwise(label_acc))
    assert rises >= len(label_acc) / 2
    assert label_acc[-1] < 0.99


def story(folder):
    log = [json.loads(line) for line in (folder / "runs/dynat-tiny-cnn-s1/log.jsonl").read_text().splitlines()]
    return log, json.loads((folder / "report.json").read_text())["results"]


def test_tiny_tells_the_papers_story(quick_start):
    check_story(*story(quick_start[0]))


def test_another_story_is_rejected(quick_start):
    log, figures = story(quick_start[0])
    swapped = [{**row, "network": {"target": "guide", "guide": "target"}[row["network"]]} for row in figures]
    for broken in ((log, swapped), (log[::-1], figures), ([{**row, "label_acc": 1.0} for row in log], figures)):
        with pytest.raises(AssertionError):
            check_story(*broken)


PARSERS = {"train_dynat.py": train_dynat.parser, "evaluate.py": evaluate.parser, "figures.py": figures.parser}


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith(("python", "torchrun"))])
def test_every_command_of_the_readme_is_a_command(line):
    """Flags and names exist; what the long ones do is in the other tests, which run the same lines on small data."""
    words = shlex.split(line.split("  #")[0])
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))  # torchrun's own flags stand before it
    script, argv = words[at], words[at + 1 :]
    parser = PARSERS[script]()
    if argv == ["--help"]:
        assert "--help" in parser.format_help()
        return
    args = parser.parse_args(argv)
    if script == "train_dynat.py":
        train_dynat.resolve({name: value for name, value in vars(args).items() if value is not None})
    if script == "evaluate.py":
        evaluate.attack_names(args.attacks or evaluate.ATTACKS)


ROWS = re.findall(r"^\| .* \| `python (train_dynat\.py .*)` \| `python (evaluate\.py .*)` \|$", README, re.MULTILINE)


def check_row(train, evaluation):
    """A row of the paper's tables trains with settings that exist, and its evaluation names the run that it leaves."""
    typed = vars(train_dynat.parser().parse_args(shlex.split(train)[1:]))
    _, folder = train_dynat.resolve({name: value for name, value in typed.items() if value is not None})
    attacked = evaluate.parser().parse_args(shlex.split(evaluation)[1:])
    assert str(attacked.checkpoint) == f"{folder}/last.pt"
    evaluate.attack_names(attacked.attacks)


def test_every_row_of_the_papers_tables_has_its_two_commands():
    assert len(ROWS) == 11 + 8 + 4 + 10
    for row in ROWS:
        check_row(*row)


def test_a_row_that_evaluates_another_run_is_rejected():
    with pytest.raises(AssertionError):
        check_row(ROWS[0][0], ROWS[1][1])


def test_a_command_with_a_flag_that_does_not_exist_is_rejected():
    with pytest.raises(UserError):
        train_dynat.parser().parse_args(["--dataset", "tiny", "--gamma", "1"])


def test_every_file_and_test_that_the_readme_names_exists():
    for target in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / target).exists(), target
    sources = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in sources, name


ALONE = {
    "models": "print(build_model('cnn', 10)(torch.rand(2, 3, 32, 32)).shape[1])",
    "attacks": "print(linf_pgd(lambda x: x.flatten(1), torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2), "
    "lambda z: -z.sum(), epsilon=0.5, step_size=0.1, steps=2).sum().item())",
    "losses": "print(dynamic_labels(torch.eye(3)).tolist())",
}
PRINTS = {"models": "10", "attacks": "9.6", "losses": "[0, 1, 2]"}


def check_alone(name, folder, source):
    (folder / f"{name}.py").write_text(source)
    program = f"import torch\nfrom {name} import *\n{ALONE[name]}"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(PRINTS[name])


@pytest.mark.parametrize("name", ALONE)
def test_each_copy_paste_module_works_alone_in_an_empty_folder(name, tmp_path):
    check_alone(name, tmp_path, (ROOT / f"{name}.py").read_text())


def test_a_module_that_needs_the_project_is_rejected(tmp_path):
    with pytest.raises(AssertionError, match="No module named 'cli'"):
        check_alone("losses", tmp_path, (ROOT / "losses.py").read_text() + "\nimport cli\n")


class Recorder(dict):
    """A dict that remembers which of its keys were asked for."""

    def __init__(self, content, read):
        super().__init__(content)
        self.read = read

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.read.add(key)
        return super().__contains__(key)


def flags(parser):
    return {action.dest for action in parser._actions} - {"help"}


def check_train_flags(parser, monkeypatch, folder):
    """Each flag is a setting that a run reads or some step takes, or changes other settings, or is main's own."""
    read, train = set(), train_dynat.train
    monkeypatch.setattr(train_dynat, "train", lambda settings, *rest: train(Recorder(settings, read), *rest))
    argv = ["--dataset", "tiny", "--train-images", "20", "--epochs", "1", "--steps", "1", "--out", str(folder / "run")]
    assert train_dynat.main(argv) == 0
    for method in train_dynat.METHODS.values():
        read |= set(train_dynat.options(method))
    plain, _ = train_dynat.resolve({})
    for flag, value in (("preset", "release"), ("lr_milestones", [5])):
        changed, _ = train_dynat.resolve({flag: value})
        if any(changed[name] != plain[name] for name in plain if name != flag):
            read.add(flag)
    source = (ROOT / "train_dynat.py").read_text()
    main = source[source.index("def main(") :]
    own = re.search(r'typed\.pop\(name, None\) for name in \(("\w+"(?:, "\w+")*)\)', main)[1]
    read |= set(re.findall(r'"(\w+)"', own)) | set(re.findall(r'settings\["(\w+)"\]', main))
    idle = flags(parser) - read
    assert not idle, f"nothing reads {idle}"


def test_every_flag_of_training_is_read_by_something(monkeypatch, tmp_path):
    check_train_flags(train_dynat.parser(), monkeypatch, tmp_path)


def test_a_flag_that_nothing_reads_is_rejected(monkeypatch, tmp_path):
    parser = train_dynat.parser()
    parser.add_argument("--idle")
    with pytest.raises(AssertionError, match=r"nothing reads \{'idle'\}"):
        check_train_flags(parser, monkeypatch, tmp_path)


def idle_flags_of_evaluation(parser):
    source = (ROOT / "evaluate.py").read_text()
    return {name for name in flags(parser) if not re.search(rf"\bargs\.{name}\b", source)}


def test_every_flag_of_evaluation_is_read_by_something():
    parser = evaluate.parser()
    assert not idle_flags_of_evaluation(parser)
    parser.add_argument("--idle")
    assert idle_flags_of_evaluation(parser) == {"idle"}


@pytest.mark.parametrize("module", [train_dynat, evaluate])
def test_help_names_every_flag_and_says_its_default(module):
    parser = module.parser()
    for action in parser._actions:
        if action.option_strings and action.dest not in ("help", "json", "resume", "data_dir"):
            assert "default" in action.help, action.dest
        assert all(flag in parser.format_help() for flag in action.option_strings)
