"""The benchmark compares equal work, counts what is done, and writes what it promises, and nothing unmeasured."""

import copy
import json
import math
from inspect import signature

import pytest
import torch
from cases import assert_state, golden_case, golden_files, joint_sgd, mutant, tiny_net
from torch import nn

from benchmarks import release, step
from train_dynat import METHODS, resolve

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
ONE_GUIDE_FORWARD = ("dynat", "lbgat")  # other releases forward it more often, which only BatchNorm's buffers show


def check_equal_work(method, theirs):
    """Two updates of the transcription and of the project's step leave the same target and the same guide."""
    settings = {**resolve({"method": method, "steps": 4})[0]}
    if "kl_weight" in settings:
        settings["kl_weight"] = 1.5
    case = golden_case(golden_files()[0], "dynat_inner")
    ours = {role: tiny_net(case[f"{role}_before"]) for role in ("target", "guide") if role in settings}
    others = copy.deepcopy(ours)
    chosen = step.arguments(settings)
    proxy = {"proxy": copy.deepcopy(ours["target"])} if "proxy" in signature(theirs).parameters else {}
    for one_update, networks, more in ((METHODS[method]["step"], ours, {}), (theirs, others, proxy)):
        optimizer = joint_sgd(SGD, *networks.values())
        for prefix in ("", "it2_"):
            x, y = case[prefix + "x"], case[prefix + "y"]
            start = (x + 0.01 * case[prefix + "noise"]).clamp(0, 1)
            one_update(**networks, optimizer=optimizer, x=x, y=y, start=start, **chosen, **more)
    assert_state(others["target"], ours["target"].state_dict(), 1e-9, "target")
    if "guide" in ours:
        once = method in ONE_GUIDE_FORWARD
        assert_state(others["guide"], ours["guide"].state_dict(), 1e-9, "guide", buffers=once)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", release.RELEASES)
def test_the_transcription_does_the_work_of_the_step(method):
    check_equal_work(method, release.RELEASES[method])


BROKEN = [
    ("dynat", ("    clean_logits = target(x) if", "    clean_logits = target(start) if")),
    ("dynat-inner", ("+ beta * F", "+ 2 * beta * F")),
    ("dynat-inner", ("guide_logits.argmax(1)", "y")),
    ("dynat-awp", ("AWP_KL_WEIGHT", "kl_weight")),
    ("lbgat", ("guide_logits) + F", "guide_logits.detach()) + F")),
    ("trades", ("kl_attack(", "label_attack(target, ")),
    ("trades-awp", ("target(x), y", "target(x_adv), y")),
    ("pgd-at", ("    target(x)  # for the books", "    pass")),
    ("at-awp", ("model(x_adv)", "model(x)")),
    ("mart", ("target.train()", "pass")),
    ("mail", ("10 * (margin", "-10 * (margin")),
    ("gairat", ("weights * len(weights)", "weights")),
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("method", "edit"), BROKEN)
def test_a_transcription_that_does_other_work_is_rejected(method, edit):
    with pytest.raises(AssertionError, match="differs"):
        check_equal_work(method, mutant(release.RELEASES[method], edit))


def guide_forwards(method):
    settings = resolve({"method": method, "steps": 7})[0]
    networks = {role: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10)) for role in ("target", "guide")}
    forwards = []
    networks["guide"].register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    more = {"proxy": copy.deepcopy(networks["target"])} if "awp" in method else {}
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    optimizer = joint_sgd(SGD, *networks.values())
    release.RELEASES[method](**networks, optimizer=optimizer, x=x, y=y, start=x, **step.arguments(settings), **more)
    assert all(forwards), "a forward without a graph"
    return len(forwards)


def test_the_release_forwards_the_guide_with_a_graph_at_every_pgd_step():
    assert [guide_forwards(name) for name in ("dynat-inner", "dynat", "dynat-inner-awp", "dynat-awp")] == [8, 1, 9, 2]


def test_the_count_is_that_of_the_shapes_forward_and_backward():
    conv, x = nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.rand(2, 3, 16, 16)
    forward = 2 * (2 * 16 * 16 * 8) * (3 * 9)
    with step.Count() as count:
        logits = conv(x)
    assert count.flop == forward
    with step.Count() as count:
        logits.sum().backward()
    assert count.flop == forward  # the weights' gradient alone
    with step.Count() as count:
        torch.autograd.grad(conv(x.requires_grad_()).sum(), x)
    assert count.flop == 2 * forward


def test_the_peak_is_the_most_held_at_once_and_not_the_sum():
    with step.Count() as count:
        for _ in range(5):
            a = torch.ones(1000)
            b = a + a.view(10, 100).sum()  # a view holds nothing of its own, the sum 4 bytes
            del a, b
    assert count.peak == 8004


def test_the_graph_of_a_linear_layer_keeps_its_input_alone():
    x = torch.rand(5, 7)
    model = nn.Sequential(nn.Linear(7, 11), nn.Sigmoid(), nn.Linear(11, 3))
    assert step.graph_bytes(model, x) == 4 * 5 * 11  # the sigmoid's result, which the second layer keeps as well
    assert step.graph_bytes(model[0], x) == 0


TOY = ["--target", "cnn", "--guide", "cnn", "--batch-size", "8", "--steps", "2", "--updates", "1", "--repeats", "2",
       "--device", "cpu"]  # fmt: skip


@pytest.fixture
def no_matmul(monkeypatch):
    monkeypatch.setattr(step, "matmul_rate", lambda device, precision: 1e9)


def written(folder, *argv):
    assert step.main([*TOY, "--json", str(folder / "step.json"), *argv]) == 0
    return json.loads((folder / "step.json").read_text())


def numbers(content):
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from numbers(value)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield content


SIDE = {"seconds_per_update", "seconds_per_update_all", "images_per_second", "flop_per_update", "flop_per_second",
        "matmul_flop_per_second", "share_of_matmul_rate", "peak_bytes"}  # fmt: skip
PARTS = {"data_seconds", "guide_seconds", "attack_seconds", "update_seconds", "release_data_seconds", "evaluation"}


def test_the_benchmark_writes_what_it_promises(tmp_path, no_matmul):
    content = written(tmp_path, "--method", "dynat-inner", "--parts", "--eval-images", "4")
    (row,) = content["rows"]
    assert {"command", "commit", "device", "torch"} <= content.keys()
    assert content["command"].startswith("python benchmarks/step.py --target cnn")
    assert row["ours"].keys() == row["release"].keys() == SIDE
    assert len(row["speedup_all"]) == len(row["ours"]["seconds_per_update_all"]) == 2
    assert row["parts"].keys() == PARTS
    assert row["graph_bytes"].keys() == {"target", "guide"}
    assert all(math.isfinite(value) and value > 0 for value in numbers(row))
    # Both do the same with the target; the release forwards the guide at each PGD step as well.
    work = [row[name]["flop_per_update"] for name in ("ours", "release")]
    assert work[1] > work[0]


def test_what_was_not_measured_is_absent(tmp_path, no_matmul):
    (row,) = written(tmp_path, "--no-release")["rows"]
    assert not {"release", "speedup", "speedup_all", "parts"} & row.keys()


def test_a_method_without_a_transcribed_release_is_measured_alone(tmp_path, no_matmul):
    (row,) = written(tmp_path, "--method", "dynat-mail")["rows"]
    assert "ours" in row and "release" not in row


def test_a_sweep_has_a_row_per_value(tmp_path, no_matmul):
    rows = written(tmp_path, "--no-release", "--sweep", "steps", "1", "3")["rows"]
    assert [row["steps"] for row in rows] == [1, 3]
    assert rows[0]["ours"]["flop_per_update"] < rows[1]["ours"]["flop_per_update"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sweep", "beta", "1"], "--sweep takes one of"),
        (["--sweep", "steps"], "--sweep takes one of"),
        (["--sweep", "steps", "many"], "'many' is not a whole number"),
        (["--out", "runs/x"], "--out changes no update"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_mistake_ends_with_one_line(capsys, argv, message):
    assert step.main(argv) == 2
    assert message in capsys.readouterr().err
