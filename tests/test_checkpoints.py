"""Checkpoints: whole or absent, safe to open, strict to load, and those of other projects; the run directory."""

import argparse
import datetime
import gzip
import io
import os
import pickle
import re
import zipfile
from pathlib import Path, PureWindowsPath
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
from cases import TinyNet
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import checkpoints
from checkpoints import claim_run_dir, find_weights, load_network, load_trained, load_weights
from cli import PARTIAL, UserError
from models import build_model

STATE = TinyNet().state_dict()
OTHER = {key: value + 1 for key, value in STATE.items()}


def message(function, *arguments):
    """What the UserError says that `function` raises: one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(content, **options):
    """The bytes of a file with `content`."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def test_a_save_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoints.save(path, {"epoch": 1})
    before = path.read_bytes()
    for owner, name, error in ((torch, "save", RuntimeError("No space\nenforce fail")), (os, "replace", OSError("No"))):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, Mock(side_effect=error))
            assert message(checkpoints.save, path, {"epoch": 2}).startswith(f"cannot write {path}: No")
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


class Bomb:
    def __reduce__(self):  # unpickled, it makes a folder
        return os.mkdir, ("ran",)


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    legacy = saved(Bomb(), _use_new_zipfile_serialization=False)
    hidden = saved({"state_dict": STATE, "args": argparse.Namespace(dtype=np.float64(1), path=Path("a"), bomb=Bomb())})
    for content in (saved({"state_dict": Bomb()}), legacy, pickle.dumps(Bomb()), saved(nn.Linear(1, 1)), hidden):
        Path("a.pt").write_bytes(content)
        assert "could run code: refused; if you trust it, " in message(checkpoints.load, "a.pt")
        assert os.listdir() == ["a.pt"]


def test_what_is_not_a_checkpoint_is_named_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, says in (("", "is a folder: name a checkpoint"), ("none", "there is no file"), ("pipe", "is not a file")):
        assert says in message(checkpoints.load, tmp_path / name)
    legacy = saved(STATE["linear.bias"], _use_new_zipfile_serialization=False)
    storage = re.search(rb"\d{9,}", legacy)[0]
    for content, says in {
        storage[::-1].join(legacy.rsplit(storage, 1)): "is a damaged or truncated checkpoint",
        saved(STATE)[:-9]: "is a damaged or truncated checkpoint",
        safetensors.torch.save(STATE)[:-9]: "is a damaged or truncated checkpoint",
        b"": "is empty",
        b"<!DOCTYPE html><html><head>": "is a web page, not a checkpoint: download the file itself",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00": "is a git-lfs pointer, not a checkpoint: fetch",
        b"404: Not Found": "is not a checkpoint: it begins with b'404: Not",
    }.items():
        (tmp_path / "a.pt").write_bytes(content)
        assert message(checkpoints.load, tmp_path / "a.pt").startswith(f"{tmp_path / 'a.pt'} {says}")


def zipped(*names):
    """The bytes of a zip archive with files of these names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return file.getvalue()


class Settings(dict):
    pass


@pytest.mark.parametrize(("content", "says"), [
    (zipped("a/data.pkl", "a/constants.pkl"), "is a TorchScript archive: torch.save(torch.jit.load(FILE).state_dict()"),
    (zipped("a/archive_format", "a/models/model.json"), "is from torch.export: torch.save(torch.export.load(FILE)"),
    (zipped("conv1.weight.npy"), "is an archive of NumPy arrays: load it with numpy.load and torch.save("),
    (zipped("weights.pt"), "is a zip archive, not a checkpoint: unpack it"),
    (gzip.compress(saved(STATE)), "is compressed: unpack it with gunzip, "),
    (b"\x08\x08\x12\x07pytorch", "is an ONNX graph, with layers merged: save the state_dict of"),
    (pickle.dumps({"bias": np.ones(1)}, 2), "is a pickle not by torch.save that could run code: refused; "),
    (saved({"model": nn.Linear(1, 1)}), "holds a whole pickled module, torch.nn.modules.linear.Linear and could run"),
    (saved({"state_dict": STATE, "cfg": Settings()}), "holds test_checkpoints.Settings and could run code: refused; "),
    (saved(STATE, pickle_protocol=4), "holds a newer pickle protocol and could run code: refused; "),
])  # fmt: skip
def test_a_whole_file_of_another_kind_is_called_what_it_is(content, says, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    assert message(checkpoints.load, tmp_path / "a.pt").startswith(f"{tmp_path / 'a.pt'} {says}")


def test_safetensors_are_read_also_as_the_only_ones_of_a_folder(tmp_path):
    for name in ("model.safetensors", "second.safetensors"):
        safetensors.torch.save_file(STATE, tmp_path / name, metadata={"format": "pt"})
        assert torch.equal(checkpoints.load(tmp_path / name)["conv2.weight"], STATE["conv2.weight"])
        if name.startswith("model"):
            assert checkpoints.load(tmp_path).keys() == STATE.keys()
    assert "name a checkpoint in it, such as" in message(checkpoints.load, tmp_path)


NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))
COMPANY = [np.float64(0.8), np.arange(3), np.random.get_state(), Path("a/b"), PureWindowsPath("a"), NOW, NOW.date(),
           NOW - NOW, argparse.Namespace(lr=np.float32(0.1), out=Path("a"))]  # fmt: skip


@pytest.mark.parametrize("company", COMPANY, ids=lambda company: type(company).__name__)
def test_harmless_objects_beside_the_weights_are_passed_over_and_never_made(company, tmp_path):
    (tmp_path / "a.pt").write_bytes(saved({"state_dict": STATE, "company": company}))
    content = checkpoints.load(tmp_path / "a.pt")
    assert torch.equal(content["state_dict"]["conv2.weight"], STATE["conv2.weight"])
    made = [type(value) for value in (content["company"] if isinstance(company, tuple) else [content["company"]])]
    assert set(made) <= {checkpoints.Unread, str, int, float}


def test_variables_that_force_a_way_of_loading_never_blame_a_good_file(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(saved(STATE))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert checkpoints.load(tmp_path / "a.pt").keys() == STATE.keys()
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    assert "was not read: Only one of `TORCH_FORCE_WEIGHTS_ONLY" in message(checkpoints.load, tmp_path / "a.pt")


def test_a_flipped_bit_is_noticed_where_the_file_has_checksums(tmp_path):
    content = bytearray(saved(STATE))
    content[content.index(STATE["conv2.weight"].numpy().tobytes())] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    assert "does not match its checksum" in message(checkpoints.load, tmp_path / "a.pt")
    torch.serialization.set_crc32_options(False)
    (tmp_path / "a.pt").write_bytes(saved(STATE))
    torch.serialization.set_crc32_options(True)
    assert torch.equal(checkpoints.load(tmp_path / "a.pt")["conv2.weight"], STATE["conv2.weight"])


@given(st.booleans(), st.randoms(use_true_random=False))
def test_a_damaged_file_is_read_or_named_in_one_line_and_a_truncated_one_never_read(tmp_path_factory, zipped, draws):
    content = bytearray(saved({"target": STATE, "epoch": 1}, _use_new_zipfile_serialization=zipped))
    for _ in range(draws.randrange(20)):
        content[draws.randrange(len(content))] = draws.randrange(256)
    size = draws.choice([len(content), draws.randrange(len(content)), len(content) - 1])
    path = tmp_path_factory.mktemp("damaged") / "last.pt"
    path.write_bytes(content[:size])
    try:
        checkpoints.load(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert size == len(content)


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_tensors_that_are_not_plain_numbers_in_memory_and_cycles_are_refused_wherever_they_are(tmp_path):
    cycle = []
    cycle.append(cycle)
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    for value in (torch.eye(2).to_sparse(), quantised, torch.ones(2, device="meta"), torch.ones(2) * 1j, cycle):
        (tmp_path / "a.pt").write_bytes(saved({"log": [{"deep": (1, value)}]}))
        assert message(checkpoints.load, tmp_path / "a.pt").startswith(str(tmp_path / "a.pt"))


def prefixed(prefix, state=STATE):
    return {f"{prefix}{key}": value for key, value in state.items()}


def found(content, **options):
    """(state_dict, layer, notes) of the TinyNet in a file with this content."""
    return find_weights(content, STATE, "a.pt", **options)


def assert_is(state_dict, expected):
    net = TinyNet()
    load_weights(net, state_dict)
    assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())


UNCOUNTED = {key: value for key, value in STATE.items() if "num_batches" not in key}


@pytest.mark.parametrize(("content", "notes"), [
    (STATE, ""),
    (UNCOUNTED, ""),
    ({**STATE, "epoch": 3}, ""),
    ({**STATE, "sub_block1.layer.0.conv1.weight": torch.zeros(8, 8)}, ""),
    ({"model_state_dict": STATE, "optimizer": {"state": {0: {"exp_avg": OTHER["conv1.weight"]}}}},
     "loaded from 'model_state_dict'"),
    ({"checkpoint": {"student": STATE}}, "loaded from 'checkpoint/student'"),
    ({"ema": STATE}, "loaded from 'ema'"),
    (prefixed("module._orig_mod."), "prefix 'module._orig_mod.' dropped"),
    ({**prefixed("module."), "n_averaged": torch.tensor(3)}, "prefix 'module.' dropped"),
    ({"state_dict": {**prefixed("net."), "criterion.weight": torch.ones(10)}},
     "loaded from 'state_dict', prefix 'net.' dropped, left out criterion.weight"),
    ({**prefixed("net."), **prefixed("critic.", {key: value[None] for key, value in STATE.items()})},
     "prefix 'net.' dropped, left out critic.conv1.weight, critic.bn1.weight, critic.bn1.bias ..."),
    ({"model": STATE, "teacher": OTHER}, "loaded from 'model', 'teacher' fits as well"),
])  # fmt: skip
def test_the_network_is_found_in_any_wrapper_and_what_was_done_is_said(content, notes):
    state_dict, layer, said = found(content)
    assert_is(state_dict, STATE)
    assert layer is None and said == notes


@pytest.mark.parametrize("content", [
    {"state_dict": STATE, "state_dict_ema": OTHER},
    {"net": STATE, "ema": {"module": OTHER}},
    {**prefixed("model."), **prefixed("ema_model.", OTHER)},
    {"net": STATE, "second": {**prefixed("module.", OTHER), "n_averaged": torch.tensor(3)}},
])  # fmt: skip
def test_an_average_is_taken_only_where_it_is_asked_for_and_the_other_is_named(content):
    for weights, expected, words in (("last", STATE, " fits as well (--weights ema takes it)"), ("ema", OTHER, "well")):
        state_dict, _, said = found(content, weights=weights)
        assert_is(state_dict, expected)
        assert said.endswith(words)
    assert message(lambda: found({"net": STATE}, weights="ema")) == "a.pt holds no averaged weights"


def test_content_without_tensors_or_with_two_networks_that_fit_is_refused():
    for content in ({}, [1], 3, "weights", {"state_dict": {}}, {"epoch": 3}, {1: torch.ones(1)}, torch.ones(3)):
        assert message(found, content).startswith("a.pt holds no state_dict of this network: no tensor in it is called")
    for entries, content in {
        "student and teacher": {"student": STATE, "teacher": OTHER},
        "student. and teacher.": {**prefixed("student."), **prefixed("teacher.")},
        "bare tensors and module.": {**STATE, **prefixed("module.")},
        "state_dict and model": {"state_dict": STATE, "model": OTHER},
    }.items():
        assert f"a.pt holds 2 networks that fit, {entries}: save the one that" in message(found, content)


def test_weights_of_another_network_are_refused_with_a_readable_list_and_nothing_is_loaded():
    net = TinyNet()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    good = {key: value + 1 for key, value in before.items()}
    other = "is of another network: "
    bad = {
        other + "1 missing (linear.bias)": {key: good[key] for key in good if key != "linear.bias"},
        other + "1 unexpected (extra)": {**good, "extra": torch.zeros(1)},
        other + "1 of another shape (linear.bias (9,) instead of (10,))": {**good, "linear.bias": torch.zeros(9)},
        other + "12 missing (conv1.weight, bn1.weight, bn1.bias ...); 14 unexpected (net.conv1.weight, net.bn1.weight, "
        "net.bn1.bias ...)": prefixed("net.", good),
    }
    damaged = "is damaged: linear.bias is not a tensor of finite numbers"
    values = [3, torch.ones(10) > 0, torch.full((10,), torch.nan), torch.full((10,), 1e300, dtype=torch.float64)]
    for says, state in [*bad.items(), *((damaged, {**good, "linear.bias": value}) for value in values)]:
        assert message(load_weights, net, state, "the target in a.pt") == f"the target in a.pt {says}"
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items()), "a partial load"


MEAN, STD = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)


@pytest.mark.parametrize(("content", "normalise"), [
    ({**STATE, "mu": MEAN, "sigma": STD}, None),
    ({**STATE, "mean": MEAN, "std": STD}, None),
    ({**prefixed("1."), "0.mean": MEAN, "0.std": STD}, None),
    ({**prefixed("model."), "normalize.mean": MEAN, "normalize.std": STD}, None),
    ({"state_dict": prefixed("net.", {**STATE, "norm.mean": MEAN, "norm.std": STD})}, None),
    (STATE, (MEAN.tolist(), STD.flatten().tolist())),
    (prefixed("module.1."), (MEAN.tolist(), STD.flatten().tolist())),
])  # fmt: skip
def test_the_images_normalisation_in_the_file_or_said_goes_in_front_of_the_network(content, normalise):
    net, loaded, x = TinyNet().eval(), TinyNet().eval(), torch.rand(2, 3, 8, 8)
    net.load_state_dict(STATE)
    state_dict, layer, _ = found(content, normalise=normalise)
    load_weights(loaded, state_dict)
    assert torch.allclose(loaded(layer(x)), net((x - MEAN.view(3, 1, 1)) / STD), atol=1e-6)


@pytest.mark.parametrize(("content", "normalise", "says"), [
    (prefixed("1."), None, "a.pt: another layer stands before '1.' and may normalise images, but how is not clear"),
    ({**prefixed("1."), "0.scale": STD}, None, "with --normalise MEAN STD (0,0,0 1,1,1 for not at all)"),
    ({**prefixed("net."), "norm.mean": MEAN}, None, "another layer stands before 'net.'"),
    ({**STATE, "mean": MEAN, "std": STD}, ([0.5], [0.5]), "a.pt has its own mean and std: leave out --normalise"),
    *[({**STATE, "mean": MEAN, "std": STD, name: torch.full((3,), value)}, None, "is not one of RGB images in [0, 1]")
      for name, value in (("mean", 127.0), ("mean", -0.1), ("mean", torch.nan), ("std", 64.0), ("std", 0.0))],
    (STATE, ([0.5, 0.5], [0.5]), "the normalisation of a.pt is not one of RGB images in [0, 1]: mean [0.5, 0.5] and"),
])  # fmt: skip
def test_a_normalisation_that_is_not_clear_or_not_of_rgb_images_is_refused(content, normalise, says):
    assert says in message(lambda: found(content, normalise=normalise))


def test_a_foreign_file_becomes_a_network_and_the_note_comes_only_after_it_has_loaded(tmp_path, capsys):
    net, path = build_model("cnn", 10), tmp_path / "a.pt"
    path.write_bytes(saved({"settings": {"lr": 1}, "weights": prefixed("net.", net.state_dict())}))
    content, _ = load_trained(path, "cnn", "tiny", normalise=([0.5], [0.25]))
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(load_network(content, "target", path, 10)(x), net.eval()((x - 0.5) / 0.25), atol=1e-5)
    assert capsys.readouterr().err == f"note: {path}: loaded from 'weights', prefix 'net.' dropped\n"
    assert "2 of another shape (linear.weight (10, 64) instead of (4" in message(
        load_network, content, "target", path, 4
    )
    assert capsys.readouterr().err == ""


def claim(run_dir):
    with claim_run_dir(run_dir, resume=True):
        pass


def test_unfinished_files_go_only_in_a_runs_folder_and_only_our_own(tmp_path):
    ours = {f".last.pt.12{PARTIAL}", f".epoch007.pt.3{PARTIAL}"}
    others = {".mine.partial", f".a.json.12{PARTIAL}", "last.pt.partial"}
    for name in ours | others:
        (tmp_path / name).write_text("precious")
    claim(tmp_path)
    assert set(os.listdir(tmp_path)) == ours | others
    (tmp_path / "config.json").write_text('{"settings": {}}')
    claim(tmp_path)
    assert set(os.listdir(tmp_path)) == others | {"config.json"}


def test_a_first_run_overwrites_no_file_and_no_pipe_of_somebody_else(tmp_path):
    for name in ("config.json", "log.jsonl", "best.pt", "weights.pt", "epoch010.pt"):
        for make in (lambda path: path.write_text('{"model": "bert"}'), os.mkfifo):
            make(tmp_path / name)
            assert f"{name} is there, but no last.pt to continue from: choose another --out" in message(claim, tmp_path)
            (tmp_path / name).unlink()


def test_a_folder_is_used_by_one_run_at_a_time_and_an_empty_one_is_removed(tmp_path):
    with claim_run_dir(tmp_path / "a" / "b", resume=False):
        assert "another run is at work in" in message(claim, tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
