"""Checkpoints: whole or absent, safe to open, strict to load, and those of other projects."""

import io
import os
import pickle
import re

import pytest
import torch
from cases import TinyNet, mutant_module
from torch import nn

import checkpoints
import cli
from cli import UserError


def message(function, *arguments):
    """What the UserError says that `function` raises: one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def listing(folder):
    return sorted(entry.name for entry in folder.iterdir())


def breaks_half_way(content, file):
    file.write(b"half")
    raise RuntimeError("No space left on device\nenforce fail at inline_container.cc")


def check_atomic(module, folder, monkeypatch):
    """A write that fails, in torch.save or in the renaming, leaves the old file as it was and nothing beside it."""
    path = folder / "last.pt"
    module.save(path, {"epoch": 1})
    before = path.read_bytes()
    for owner, name, broken in ((torch, "save", breaks_half_way), (os, "replace", lambda *_: os.stat("/nowhere"))):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            assert message(module.save, path, {"epoch": 2}).startswith(f"cannot write {path}: ")
        assert path.read_bytes() == before, "the old checkpoint is damaged"
        assert listing(folder) == ["last.pt"], "a half-written file is left"
    module.save(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 2}


def test_a_failing_save_leaves_the_old_checkpoint_and_no_litter(tmp_path, monkeypatch):
    check_atomic(checkpoints, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("with written_whole(path) as aside, open(aside,", "with open(path,"),
        ("except (OSError, RuntimeError) as error:", "except OSError as error:"),
    ],
)
def test_a_save_that_is_not_atomic_is_rejected(old, new, tmp_path, monkeypatch):
    with pytest.raises((AssertionError, RuntimeError, OSError)):
        check_atomic(mutant_module(checkpoints, (old, new)), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('aside = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")', "aside = path"),
        ("aside.unlink(missing_ok=True)", "pass"),
    ],
)
def test_a_writing_aside_that_is_not_is_rejected(old, new, tmp_path, monkeypatch):
    broken = mutant_module(checkpoints)
    broken.written_whole = mutant_module(cli, (old, new)).written_whole
    with pytest.raises((AssertionError, OSError)):
        check_atomic(broken, tmp_path, monkeypatch)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    content = {"target": TinyNet().state_dict(), "epoch": 3, "settings": {"lr": 0.1, "guide": "cnn"}, "classes": ["a"]}
    checkpoints.save(tmp_path / "last.pt", content)
    loaded = checkpoints.load(tmp_path / "last.pt")
    assert loaded.keys() == content.keys()
    assert all(torch.equal(loaded["target"][key], value) for key, value in content["target"].items())
    assert {key: loaded[key] for key in ("epoch", "settings", "classes")} == {
        key: content[key] for key in ("epoch", "settings", "classes")
    }


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def check_refuses_code(module, folder):
    """A file that would run code is refused in words, and the code is not run; so is a whole pickled network."""
    torch.save({"state_dict": Bomb(folder / "ran")}, folder / "zip.pt")
    (folder / "bare.pt").write_bytes(pickle.dumps(Bomb(folder / "ran")))
    torch.save(nn.Linear(1, 1), folder / "network.pt")
    for name in ("zip.pt", "bare.pt", "network.pt"):
        try:
            module.load(folder / name)
        except UserError as error:
            assert "refused" in str(error)
        else:
            raise AssertionError(f"{name} was opened")
        assert not (folder / "ran").exists(), "the file's code was run"


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    check_refuses_code(checkpoints, tmp_path)


def test_a_loader_that_runs_code_is_rejected(tmp_path):
    with pytest.raises(AssertionError):
        check_refuses_code(mutant_module(checkpoints, ("weights_only=True)", "weights_only=False)")), tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><head><title>Sign in</title>", "is a web page"),
        (b"\n  <html lang='en'>", "is a web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
        (b"404: Not Found", "is no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a git-lfs pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "is no checkpoint"),
        (bytes(4096), "is no checkpoint"),
        (b"PK\x03\x04" + bytes(64), "is no checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named_in_one_line(content, says, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    assert f"{path} {says}" in message(checkpoints.load, path)


def test_a_folder_and_a_missing_file_are_named_in_one_line(tmp_path):
    assert "is a folder: name a checkpoint in it" in message(checkpoints.load, tmp_path)
    assert message(checkpoints.load, tmp_path / "none.pt") == f"there is no file {tmp_path / 'none.pt'}"


def check_checksums(module, folder):
    """One bit of a weight that is another one is noticed; checksums that were not written are not missed."""
    path, state = folder / "weights.pt", TinyNet().state_dict()
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[content.index(state["conv2.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["conv2.weight"], state["conv2.weight"])
    assert "does not match its checksum" in message(module.load, path)
    former = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(former)
    assert torch.equal(module.load(path)["conv2.weight"], state["conv2.weight"])


def test_a_flipped_bit_is_noticed(tmp_path):
    check_checksums(checkpoints, tmp_path)


@pytest.mark.parametrize(("old", "new"), [("if damaged:", "if False:"), ("written and archive", "archive")])
def test_a_loader_that_misreads_checksums_is_rejected(old, new, tmp_path):
    with pytest.raises((AssertionError, UserError, pytest.fail.Exception)):
        check_checksums(mutant_module(checkpoints, (old, new)), tmp_path)


def test_a_pipe_is_refused_before_it_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert message(checkpoints.load, tmp_path / "pipe") == f"{tmp_path / 'pipe'} is no file"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999, "all but a byte"])
def test_a_truncated_checkpoint_is_refused_wherever_it_ends(share, zipped, tmp_path):
    whole = io.BytesIO()
    torch.save({"target": TinyNet().state_dict(), "epoch": 1}, whole, _use_new_zipfile_serialization=zipped)
    size = whole.getbuffer().nbytes
    path = tmp_path / "last.pt"
    path.write_bytes(whole.getvalue()[: size - 1 if share == "all but a byte" else int(share * size)])
    assert str(path) in message(checkpoints.load, path)


ADAPTED = {
    "bare": lambda state: state,
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "both": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "both, the other way": lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    "state_dict": lambda state: {"state_dict": state, "epoch": 7},
    "model": lambda state: {"model": state, "optimizer": {}},
    "net": lambda state: {"net": {f"module.{key}": value for key, value in state.items()}, "acc": 80.0},
    "sub_block1": lambda state: {
        **state,
        "sub_block1.layer.0.bn1.weight": torch.zeros(8),
        "module.sub_block1.layer.0.conv1.weight": torch.zeros(8, 8),
    },
}


def check_adapter(module, name):
    """The weights that another project keeps in its own way arrive unchanged, every one of them."""
    torch.manual_seed(0)
    state = TinyNet().state_dict()
    net = TinyNet()
    module.load_weights(net, module.bare_state_dict(ADAPTED[name](state)))
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", ADAPTED)
def test_weights_of_other_projects_load_strictly(name):
    check_adapter(checkpoints, name)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("both", "while key.startswith(PREFIXES)", "if key.startswith(PREFIXES)"),
        ("module.", 'PREFIXES = ("module.", ', "PREFIXES = ("),
        ("net", '"model", "net")', '"model")'),
        ("sub_block1", "if not key.startswith(DEAD_PREFIX):", "if True:"),
    ],
)
def test_an_adapter_that_forgets_a_way_is_rejected(name, old, new):
    with pytest.raises(UserError):
        check_adapter(mutant_module(checkpoints, (old, new)), name)


@pytest.mark.parametrize(
    "content", [{}, [1, 2], 3, "weights", {"state_dict": {}}, {"epoch": 3}, {1: torch.zeros(1)}, torch.zeros(3)]
)
def test_content_without_a_state_dict_is_refused(content):
    assert "the file holds no state_dict" in message(checkpoints.bare_state_dict, content)


def check_strict(module):
    """Missing, unexpected and reshaped entries are refused by name, with nothing loaded."""
    net = TinyNet()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    good = {key: value + 1 for key, value in before.items()}
    cases = {
        r"1 missing \(linear\.bias\)": {key: value for key, value in good.items() if key != "linear.bias"},
        r"1 unexpected \(extra\)": {**good, "extra": torch.zeros(1)},
        r"1 of another shape \(linear\.bias \(100,\) instead of \(10,\)\)": {**good, "linear.bias": torch.zeros(100)},
        r"14 missing \(conv1\.weight, bn1\.weight, bn1\.bias \.\.\.\); 1 unexpected \(a\)": {"a": torch.zeros(1)},
    }
    for pattern, state in cases.items():
        try:
            module.load_weights(net, state, "the target in last.pt")
        except UserError as error:
            assert re.fullmatch(f"the target in last.pt is of another network: {pattern}", str(error)), str(error)
        else:
            raise AssertionError(f"loaded in spite of {pattern}")
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items()), "a partial load"
    module.load_weights(net, good)
    assert all(torch.equal(value, good[key]) for key, value in net.state_dict().items())


def test_weights_of_another_network_are_refused_with_a_readable_list():
    check_strict(checkpoints)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("missing = [key for key in own if key not in state_dict]", "missing = []"),
        ("unexpected = [key for key in state_dict if key not in own]", "unexpected = []"),
        ("if key in state_dict and state_dict[key].shape != own[key].shape", "if False"),
        ("    model.load_state_dict(state_dict)\n", "    pass\n"),
        ("    own = model.state_dict()\n", "    own = model.state_dict()\n    model.bn1.bias.data += 1\n"),
    ],
)
def test_a_loader_that_is_not_strict_is_rejected(old, new):
    with pytest.raises((AssertionError, RuntimeError)):
        check_strict(mutant_module(checkpoints, (old, new)))


def check_normalisation(module):
    """Another project's normalisation becomes a layer in front: f((x - mean) / std), whatever its names and shapes."""
    torch.manual_seed(0)
    net, x = TinyNet().eval(), torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.2, 0.25, 0.3])
    expected = net((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    for names in (("mu", "sigma"), ("mean", "std")):
        for shape in ((3,), (3, 1, 1), (1, 3, 1, 1)):
            buffers = dict(zip(names, (mean.reshape(shape), std.reshape(shape)), strict=True))
            content = {"state_dict": {f"module.{key}": value for key, value in (net.state_dict() | buffers).items()}}
            state, normalisation = module.take_normalisation(module.bare_state_dict(content))
            loaded = TinyNet().eval()
            module.load_weights(loaded, state)
            assert torch.allclose(module.Normalised(loaded, *normalisation)(x), expected, atol=1e-6)
    state, normalisation = module.take_normalisation(net.state_dict())
    assert list(state) == list(net.state_dict()) and normalisation is None
    for bad in (
        (255 * mean, std),
        (mean, 255 * std),
        (-mean, std),
        (mean, 0 * std),
        (mean, -std),
        (mean / 0, std),
        (mean[:2], std),
    ):
        try:
            module.take_normalisation({**net.state_dict(), "mean": bad[0], "std": bad[1]})
        except UserError as error:
            assert "the file's normalisation is not one of RGB images in [0, 1]: mean [" in str(error)
        else:
            raise AssertionError(f"a normalisation by {bad} was taken")


def test_a_normalisation_kept_with_the_weights_goes_in_front_of_the_network():
    check_normalisation(checkpoints)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(x - self.mean) / self.std", "x - self.mean / self.std"),
        ("for value in (mean, std))", "for value in (std, mean))"),
        ('("mu", "sigma"), ', ""),
        ("(mean <= 1)", "(mean <= 255)"),
        ("(mean >= 0)", "(mean >= -1)"),
        ("(std <= 1)", "(std <= 255)"),
        ("(std > 0)", "(std > -1)"),
        ("sizes <= {1, 3}", "sizes"),
    ],
)
def test_another_normalisation_is_rejected(old, new):
    with pytest.raises((AssertionError, UserError, RuntimeError)):
        check_normalisation(mutant_module(checkpoints, (old, new)))


@pytest.mark.parametrize("value", [3, "a", [1.0], torch.ones(10) * 1j], ids=["int", "str", "list", "complex"])
def test_a_weight_that_is_no_tensor_of_real_numbers_is_refused(value):
    net = TinyNet()
    state = {**net.state_dict(), "linear.bias": value}
    assert "linear.bias is no tensor of real numbers" in message(checkpoints.load_weights, net, state)
    assert message(checkpoints.load_weights, net, [state]) == "checkpoint is no state_dict"


def test_two_entries_of_one_name_are_refused():
    state = {"module.conv1.weight": torch.zeros(1), "conv1.weight": torch.ones(1)}
    assert "holds conv1.weight twice" in message(checkpoints.bare_state_dict, state)
