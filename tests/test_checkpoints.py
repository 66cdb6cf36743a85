"""Checkpoints: whole or absent, safe to open, strict to load, and those of other projects; the run directory."""

import io
import os
import pickle
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from cases import TinyNet
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import checkpoints
from checkpoints import bare_state_dict, claim_run_dir, load_weights, split_normalisation
from cli import PARTIAL, UserError

STATE = TinyNet().state_dict()


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
    for content in (saved({"state_dict": Bomb()}), legacy, pickle.dumps(Bomb()), saved(nn.Linear(1, 1))):
        Path("a.pt").write_bytes(content)
        assert "holds more than tensors and numbers and could run code: refused" in message(checkpoints.load, "a.pt")
        assert os.listdir() == ["a.pt"]


def test_what_is_not_a_checkpoint_is_named_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, says in (("", "is a folder: name a checkpoint"), ("none", "there is no file"), ("pipe", "is not a file")):
        assert says in message(checkpoints.load, tmp_path / name)
    legacy = saved(STATE["linear.bias"], _use_new_zipfile_serialization=False)
    storage = re.search(rb"\d{9,}", legacy)[0]
    for content, says in {
        storage[::-1].join(legacy.rsplit(storage, 1)): "is not a checkpoint, or a",
        b"": "is empty",
        b"<!DOCTYPE html><html><head>": "is a web page, not a checkpoint: download the file itself",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00": "is a git-lfs pointer, not a checkpoint: fetch",
        b"404: Not Found": "is not a checkpoint, or a",
    }.items():
        (tmp_path / "a.pt").write_bytes(content)
        assert message(checkpoints.load, tmp_path / "a.pt").startswith(f"{tmp_path / 'a.pt'} {says}")


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


def test_weights_of_other_projects_load_strictly():
    prefixed = {f"module._orig_mod.{key}": value for key, value in STATE.items()}
    dead = {**STATE, "module.sub_block1.layer.0.conv1.weight": torch.zeros(8, 8)}
    uncounted = {key: value for key, value in STATE.items() if "num_batches" not in key}
    wrapped = [{"state_dict": STATE, "epoch": 7}, {"model": prefixed, "optimizer": {}}, {"net": STATE, "acc": 80.0}]
    for content in (STATE, prefixed, dead, uncounted, *wrapped):
        net = TinyNet()
        load_weights(net, bare_state_dict(content))
        assert all(torch.equal(value, STATE[key]) for key, value in net.state_dict().items())


def test_content_without_a_state_dict_or_with_two_entries_of_one_name_is_refused():
    for content in ({}, [1], 3, "weights", {"state_dict": {}}, {"epoch": 3}, {1: torch.ones(1)}, torch.ones(3)):
        assert "the file holds no state_dict" in message(bare_state_dict, content)
    assert "holds bias twice" in message(bare_state_dict, {"module.bias": torch.ones(1), "bias": torch.ones(1)})


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
        "net.bn1.bias ...); all keys begin with 'net.'": {f"net.{key}": value for key, value in good.items()},
    }
    damaged = "is damaged: linear.bias is not a tensor of finite numbers"
    values = [3, torch.ones(10) > 0, torch.full((10,), torch.nan), torch.full((10,), 1e300, dtype=torch.float64)]
    for says, state in [*bad.items(), *((damaged, {**good, "linear.bias": value}) for value in values)]:
        assert message(load_weights, net, state, "the target in a.pt") == f"the target in a.pt {says}"
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items()), "a partial load"


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mean", "std"), ("0.mean", "0.std")])
def test_a_normalisation_kept_with_the_weights_goes_in_front_of_the_network(names):
    net, loaded, x = TinyNet().eval(), TinyNet().eval(), torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.2, 0.25, 0.3])
    prefix = "1." if "." in names[0] else ""
    content = {f"{prefix}{key}": value for key, value in net.state_dict().items()}
    state, normalisation = split_normalisation(
        bare_state_dict({**content, names[0]: mean, names[1]: std.view(3, 1, 1)})
    )
    load_weights(loaded, state)
    expected = net((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert torch.allclose(loaded(normalisation(x)), expected, atol=1e-6)
    for name, value in (("mean", 127.0), ("mean", -0.1), ("mean", torch.nan), ("std", 64.0), ("std", 0.0)):
        bad = {**STATE, "mean": mean, "std": std, name: torch.full((3,), value)}
        assert "the file's normalisation is not one of RGB images in [0, 1]: mean [" in message(
            split_normalisation, bad
        )


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
