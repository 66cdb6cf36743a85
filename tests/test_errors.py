"""Bad input through the command lines, as a person types it: each mistake ends with one line that says what is wrong,
status 2, no traceback, nothing overwritten and no litter."""

import errno
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import checkpoints
import cli
import data
import evaluate
import figures
import train_dynat

SHORT = "--dataset tiny --train-images 40 --epochs 1 --steps 1 --device cpu"
FOLDER = "--dataset folder --data-dir photos --target cnn --guide cnn --epochs 1 --steps 1 --device cpu --out own"
RESUME = "--resume --out run --epochs 3 --device cpu"
EVALUATE = "run/last.pt --attacks clean --device cpu"
BARE = "run/weights.pt --target cnn --dataset tiny"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two epochs."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TINY_SIZE", {"train": 200, "test": 40})
        assert train_dynat.main([*f"{SHORT} --epochs 2 --val-images 20 --ema 0.9 --out".split(), str(run_dir)]) == 0
    return run_dir


@pytest.fixture
def error_of(finished, tmp_path, monkeypatch, capfd):
    """`error_of(argv, main)` is the line in which it ends, in a folder in which `run` is the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TINY_SIZE", {"train": 200, "test": 40})

    def tree():
        return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}

    def run(argv, main=train_dynat.main):
        before = tree()
        capfd.readouterr()
        assert main(shlex.split(argv)) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: ") and err.endswith("\n") and err[:-1].isprintable(), err
        assert tree() == before, "something was overwritten or removed, or litter is left"
        return err

    return run


TRAIN = {
    "--epoch 3": "unrecognized arguments: --epoch",  # no abbreviations: a typo is never another flag
    "--epsilon 8/0": "--epsilon: '8/0' is not a number like 0.031 or 8/255",
    f"--lr 1{'0' * 400}/3": "is not a number like",
    "--epsilon 8": "--epsilon: 8 is out of range: it must be between 0 and 1",
    "--epochs 0": "--epochs: 0 is out of range: it must be at least 1",
    "--epochs 1.5": "--epochs: '1.5' is not a whole number",
    f"--seed 1{'0' * 30}": "is out of range: it must be between 0 and",
    "--target 'cnn\n\033[2Jx'": "unknown network 'cnn  [2Jx': choose from resnet18",
    f"{SHORT} --device abacus": "device 'abacus' cannot be used here",
    f"{SHORT} --sync-bn": "--sync-bn needs an NVIDIA GPU: leave it out",
    f"{SHORT} --train-images 201": "201 images are asked for, but there are only 200",
    f"{SHORT} --val-images 180": "--train-images 40: only 20 of 200 are left after --val-images 180",
    "--dataset tiny --val-images 200": "200 images held out of 200 leave none to train on",
    "--dataset folder": "--dataset folder needs --data-dir",
    f"{SHORT} --out run": "run exists already: continue it with --resume, or choose",
    "--resume --out run --beta 2": "the beta of the run in run was 1.0, is 2.0: leave that flag out",
    "--resume --out run --epochs 1": "the run in run has 2 epochs already: give more --epochs",
    f"{SHORT} --out run/log.jsonl/a": "a cannot be made (Not a directory): choose another --out",
    f"{SHORT} --out {'a' * 300}": "File name too long",
}
OTHERS = {
    "run/last.pt --images 41": "there are only 40",
    "run/last.pt --attacks clean,pgd0": "unknown attack 'pgd0': choose from clean",
    "run/last.pt --attacks ,": "--attacks names no attack",
    "run/last.pt --target wrn10-1": "is cnn, not wrn10-1",
    "run/last.pt --json none/figures.json": "in a folder that exists",
    "run/last.pt --json run/last.pt": "a name that ends in .json",
    "run/last.pt --protocol paper --epsilon 0.031 --images 9": "leave out --epsilon 0.031 and --images 9",
    "run/weights.pt": "holds bare weights: say --target NAME and --dataset NAME",
    f"{BARE} --network guide": "holds no guide",
    f"{BARE} --weights ema": "holds no averaged weights",
    f"{BARE} --normalise 127,126,125 64": "not one of RGB images in [0, 1]: mean [127.0, 126.0, 125.0] and std",
    "run/last.pt --normalise 0.5 0.25": "is of a run, which normalises no images: leave out --normalise",
    "clean none --out a.png": "there is no file none/config.json",
}


@pytest.mark.parametrize(("argv", "says"), [*TRAIN.items(), *OTHERS.items()])
def test_a_mistyped_flag_a_wrong_value_and_a_missing_file_are_named_and_a_string_is_refused(argv, says, error_of):
    module = train_dynat if argv in TRAIN else figures if argv.startswith("clean") else evaluate
    assert says in error_of(argv, module.main)
    with pytest.raises(TypeError, match="a list of words"):
        module.main(argv)


def test_too_little_memory_is_one_line_and_a_bug_is_a_traceback(error_of, monkeypatch):
    cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    for error in (torch.OutOfMemoryError("CUDA out of memory.\nGPU 0"), cpu, MemoryError()):
        monkeypatch.setattr(train_dynat, "build_model", Mock(side_effect=error))
        assert "try a smaller --batch-size or, in training, --precision bf16" in error_of(SHORT)
    monkeypatch.setattr(train_dynat, "build_model", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train_dynat.main(SHORT.split())


@pytest.mark.parametrize("name", ["hpu", "xla", "cuda:7", "vulkan", "privateuseone", "abacus"])
def test_a_device_that_is_not_there_is_one_short_line(name, error_of):
    assert len(error_of(f"{SHORT} --device {name}")) < 200


def test_a_tilde_is_the_home_in_every_flag_that_is_a_path(error_of, monkeypatch):
    monkeypatch.setenv("HOME", str(Path("run").resolve()))
    folder = "--dataset folder --data-dir=~/photos"
    for main, argv in ((train_dynat.main, "--out=~"), (train_dynat.main, f"{folder} --target cnn --device cpu --out a"),
                       (evaluate.main, "~/none.pt"), (evaluate.main, f"run/last.pt {folder}"),
                       (evaluate.main, "run/last.pt --json=~/none/a.json"), (figures.main, "clean ~/none --out a.png"),
                       (figures.main, "clean run --out=~/none/a.png")):  # fmt: skip
        assert os.environ["HOME"] in error_of(argv, main)


def photos():
    """Two classes of images of different colours, two each to train and to test on."""
    for number, name in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        Path("photos", name).mkdir(parents=True)
        for image in range(2):
            picture = Image.new("RGB", (32, 32), (60 * number, 60 * image, 0))
            picture.paste("white", (0, 0, 9, 9))
            picture.save(Path("photos", name, f"{image}.png"))


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda cat: shutil.rmtree(cat.parent), "there is no folder"),
    (shutil.rmtree, "holds 1 class folders: at least two are needed"),
    (lambda cat: (cat.parent / "emu").mkdir(), "emu holds no images"),
    (lambda cat: cat.rename(cat.parent / "lynx"), "the training set has other classes: 'dog' there is 'cat' here"),
    (lambda cat: shutil.copytree(cat, cat.parent / "emu"), "3 classes, but these images have 2: 'emu' is missing"),
    (lambda cat: (cat / "z.png").write_text("no"), "z.png cannot be read as an image"),
    (lambda cat: Image.new("1", (16_000, 12_000)).save(cat / "z.png"), "z.png cannot be read as an image (Im"),
    (lambda cat: os.mkfifo(cat / "z.png"), "z.png is not a file"),
    (lambda cat: Image.new("F", (9, 9)).save(cat / "z.tif"), "an image (32 bits per pixel: save it"),
    (lambda cat: Image.new("I", (9, 9)).save(cat / "z.tif"), "an image (32 bits per pixel: save it"),
])  # fmt: skip
def test_a_folder_of_images_that_cannot_be_used_is_named(spoil, says, error_of):
    photos()
    spoil(Path("photos/train/cat"))
    assert says in error_of(FOLDER)


def test_resume_needs_the_same_images_wherever_they_are(error_of):
    photos()
    assert train_dynat.main(FOLDER.split()) == 0
    Path("photos").rename("moved")
    resume = "--resume --out own --epochs 2 --data-dir"
    assert "there is no folder" in error_of(f"{resume} photos")
    for split, changed in (("train", "other/train/cat/z.png"), ("test", "other/test/dog/0.png")):
        shutil.copytree("moved", "other")
        shutil.copy("moved/test/cat/0.png", changed)
        assert f"the {split} images are not those of the run: to resume, bring" in error_of(f"{resume} other")
        shutil.rmtree("other")
    assert train_dynat.main(f"{resume} moved".split()) == 0
    assert json.loads(Path("own/config.json").read_text())["settings"]["data_dir"] == str(Path("moved").resolve())


NAN, GONE, ONES = float("nan"), object(), torch.ones(3)
DAMAGED = "is damaged: linear.bias is not a tensor of finite numbers"
UNTRAINED = {  # what is wrong, where in the checkpoint, and with what there
    "it has no target": [("target", [1])],
    "it has no epoch": [("epoch", True)],
    "it has no names of classes": [("classes", [1, 2])],
    "it has no data_dir": [("settings/data_dir", 5)],
    "it has no settings and config of finite numbers": [("settings/lr", NAN), ("config/commit", ONES)],
    DAMAGED: [("target/linear.bias", NAN * ONES)],
}
UNFINISHED = {
    "it has no optimizer": [("optimizer", GONE)],
    "it has no log": [("epoch", 10**40), ("log/0/loss", NAN), ("log/0/lr", [1]), ("log/0/seconds", GONE)],
    "no log of numbers": [("log/0/test_acc", 1.5), ("log/0/val_pgd", -0.1), ("log/0/7", 1.0)],
    "the train images are not those of the run": [("images/train", 3)],
    "the run has other classes: 'a' there is 'class0' here": [("classes", list("abcdefghij"))],
    "has no method that this version": [("settings/method", ["dynat"])],
    "has no batch_size that this version": [("settings/batch_size", 0)],
    "has no beta that this version": [("settings/beta", 10**40), ("settings/beta", GONE)],
    "has no colour that this version": [("settings/colour", "red")],
    "has no milestones that": [("settings/milestones", [(1, 1.0), (1,)]), ("settings/milestones", [(2, 1)])],
    "has no lr_milestones that": [("settings/lr_milestones", 3)],
    "has no inner that": [("settings/inner", True)],
    "the checkpoint's guide is not a state_dict": [("guide", [1]), ("guide", GONE)],
    f"the checkpoint's ema {DAMAGED}": [("ema/linear.bias", NAN * ONES)],
    "momentum is": [("optimizer/state", {}), ("optimizer/state/99", 3), ("optimizer/state/0/momentum_buffer", ONES)],
    "momentum is of another network: 1 unexpected (99)": [("optimizer/state/99", {"momentum_buffer": ONES})],
}


@pytest.mark.parametrize(("argv", "foreign"), [(EVALUATE, UNTRAINED), (RESUME, UNTRAINED | UNFINISHED)])
def test_a_checkpoint_that_is_well_formed_but_not_a_whole_run_is_refused(argv, foreign, error_of):
    for says, changes in foreign.items():
        for path, value in changes:
            whole = content = checkpoints.load("run/best.pt")  # as whole as last.pt
            *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
            for key in keys:
                content = content[key]
            content.pop(last) if value is GONE else content.__setitem__(last, value)
            checkpoints.save("run/last.pt", whole)
            assert says in error_of(argv, train_dynat.main if argv == RESUME else evaluate.main), path


def test_a_pipe_in_the_place_of_a_log_or_configuration_does_not_stop_a_resume(error_of):
    for name in ("log.jsonl", "config.json"):
        Path("run", name).unlink()
        os.mkfifo(Path("run", name))
    assert train_dynat.main(shlex.split(RESUME)) == 0
    assert json.loads(Path("run/config.json").read_text())["settings"]["epochs"] == 3


def test_a_pipe_that_ends_names_what_was_kept(error_of, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert train_dynat.main(f"{SHORT} --epochs 3 --out a".split()) == 2
    kept = "everything up to epoch 1 is saved; to go on, add --out a --resume"
    assert capfd.readouterr().err == f"error: nobody reads standard output any more: {kept}\n"


def test_a_full_disk_behind_standard_output_is_named(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", Mock(flush=Mock(side_effect=OSError(errno.ENOSPC, "No space left"))))
    assert cli.exit_status(lambda argv: None)([]) == 2
    assert capfd.readouterr().err == f"error: standard output: [Errno {errno.ENOSPC}] No space left\n"


def test_closed_streams_and_a_terminal_without_the_letters_do_not_end_a_command(error_of, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", None)
    assert train_dynat.main(f"{SHORT} --out größer".split()) == 0
    assert b"gr\\xf6\\xdfer" in terminal.buffer.getvalue()
    assert train_dynat.main(["--device", "abacus"]) == 2
    monkeypatch.setattr(sys, "stdout", None)
    assert train_dynat.main(f"{SHORT} --out b".split()) == 0


def test_without_a_terminal_the_time_left_is_a_line_every_minute(monkeypatch, capsys):
    monkeypatch.setattr(cli.time, "monotonic", Mock(side_effect=[0, 50, 61, 100, 122]))
    with cli.Progress(total=100, done=20) as progress:
        for _ in range(4):
            progress.advance(10, "epoch 1/2")
        progress.write("epoch 1")
    assert capsys.readouterr() == ("epoch 1/2: about 03:03 left\nepoch 1/2: about 02:02 left\nepoch 1\n", "")


def test_torchs_variables_for_loading_blame_no_file(error_of, monkeypatch):
    for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "1")
    assert evaluate.main(EVALUATE.split()) == 0


def test_a_callers_precision_of_products_reaches_no_figure_and_comes_back():
    torch.set_float32_matmul_precision("medium")
    with cli.numerics(deterministic=True):
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")


def test_the_commit_is_this_folders_whatever_git_is_told(tmp_path, monkeypatch, capsys):
    own, commit = tmp_path / "own", lambda: cli.provenance(torch.device("cpu"))["commit"]
    monkeypatch.setattr(cli, "__file__", str(own / "cli.py"))
    own.mkdir()
    for folder in (tmp_path, own):  # one repository within another
        subprocess.run(["git", "init", "-q", folder], check=True)
        author = ["-c", "user.name=a", "-c", "user.email=a"]
        subprocess.run(["git", "-C", folder, *author, "commit", "-qm", folder.name, "--allow-empty"], check=True)
    expected = commit()
    assert len(expected) == 40
    for name, value in {"GIT_DIR": tmp_path / ".git", "GIT_WORK_TREE": "/", "GIT_INDEX_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, str(value))
        assert commit() == expected
    assert capsys.readouterr().err == ""
    shutil.rmtree(own / ".git" / "refs")
    monkeypatch.delenv("GIT_DIR")
    assert commit() is None
    monkeypatch.setenv("PATH", "")
    assert commit() is None
    assert capsys.readouterr().err.count("note: the commit of this program is unknown, since git failed: ") == 2


def test_main_also_in_a_thread_leaves_nothing_behind_and_restores_torch(error_of):
    def state():
        precisions = [part.fp32_precision for part in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)]
        modes = [torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()]
        modes += [torch.backends.cudnn.deterministic, torch.utils.deterministic.fill_uninitialized_memory]
        return precisions, modes, torch.get_rng_state().tolist()

    torch.use_deterministic_algorithms(True, warn_only=True)
    before, files, statuses = state(), sorted(os.listdir("run")), []
    for main, argv in ((train_dynat.main, f"{SHORT} --train-images 201 --out a"), (evaluate.main, EVALUATE),
                       (train_dynat.main, f"{SHORT} --no-deterministic --out b")):  # fmt: skip
        thread = threading.Thread(target=lambda main=main, argv=argv: statuses.append(main(argv.split())))
        thread.start()
        thread.join()
        assert state() == before
    torch.use_deterministic_algorithms(False)
    assert statuses == [2, 0, 0] and sorted(os.listdir()) == ["b", "run"] and sorted(os.listdir("run")) == files
