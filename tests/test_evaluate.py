"""The evaluation: what it says of a network is true, repeatable, and checked by itself."""

import json
import math
import os
import re
import signal
import sys
from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import counted_accuracy
from conftest import ROOT
from torch import nn
from torchvision.transforms import Normalize

import attacks
import checkpoints
import cli
import evaluate
import robustness
import train_dynat
from attacks import uniform_start
from cli import UserError
from data import class_balanced_subset, load_images, make_generator, to_float
from models import build_model

BUDGET = {"epsilon": 8 / 255, "step_size": 2 / 255}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of a second or two, whose guide learned something."""
    out = tmp_path_factory.mktemp("run") / "dynat"
    flags = "--dataset tiny --train-images 320 --epochs 5 --steps 1 --batch-size 32 --eval-every 9 --ema 0.9999 --out"
    assert train_dynat.main([*flags.split(), str(out)]) == 0
    return out


@pytest.fixture
def model(run):
    """The run's guide: right about most clean images, and easily fooled."""
    return checkpoints.load_network(checkpoints.load(run / "last.pt"), "guide", run, 10)


@pytest.fixture(scope="module")
def images():
    return class_balanced_subset(load_images("tiny", "test"), 40, 0)


def mask_under(model, images, name, indices=slice(None), **settings):
    indices = torch.arange(len(images.y))[indices]
    settings = {**BUDGET, "batch_size": 20, "seed": 0, **settings}
    return robustness.correct_under_attack(model, images, indices, name, **settings)


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.cw])
def test_a_fooled_image_stays_fooled(attack, model, images):
    """An image that is fooled after k steps keeps that very iterate, the start included; the others become fewer."""
    x, y = to_float(images.x), images.y
    start = before = uniform_start(x, 8 / 255, make_generator("cpu", 0))
    for steps in (1, 2, 4):
        fooled = ~robustness.is_correct(model, before, y)
        after = attack(model, x, y, start, **BUDGET, steps=steps)
        assert fooled.any() and torch.equal(after[fooled], before[fooled])
        before = after
    assert robustness.is_correct(model, after, y).sum() < robustness.is_correct(model, start, y).sum() - 5


def test_fgsm_is_one_step_of_epsilon_from_the_image_itself(model, images):
    x = to_float(images.x).requires_grad_()
    y = model(x).argmax(1)  # a mistake would not be moved
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    x_adv = robustness.attack_batch(model, "fgsm", x.detach(), y, torch.arange(40), **BUDGET, seed=0)
    assert torch.allclose(x_adv, (x + 8 / 255 * gradient.sign()).clamp(0, 1))
    assert F.cross_entropy(model(x_adv), y) > F.cross_entropy(model(x), y) + 0.1


def test_a_name_is_an_attack_of_the_table():
    pgd = robustness.find_attack("pgd9999")
    assert pgd.title == "PGD-9999" and pgd.settings["steps"] == 9999
    for name in ("pgd0", "pgd07", "pgd10000", "pgd", "pgd<steps>", "cw3", "aa-slow", "apgd-ce", "PGD7", ""):
        assert robustness.find_attack(name) is None, name


@pytest.mark.parametrize(("name", "attack", "steps"), [("pgd4", attacks.pgd, 4), ("cw", attacks.cw, 20)])
def test_starts_depend_on_seed_attack_and_index_alone(name, attack, steps, model, images):
    """They are the uniform starts of blocks of 32 images, whichever images are attacked."""
    x, indices, key = to_float(images.x), torch.arange(40), (3, name)
    blocks = [torch.rand(32, 3, 32, 32, generator=make_generator("cpu", *key, block)) for block in (0, 1)]
    starts = (x + 8 / 255 * (2 * torch.cat(blocks)[:40] - 1)).clamp(0, 1)
    for part in (slice(40), slice(7, 9), slice(30, 40), [39, 2, 33, 0]):
        found = robustness.uniform_starts(x[part], indices[part], 8 / 255, key)
        assert torch.equal(found, starts[part]) and found.is_contiguous(memory_format=torch.channels_last)
    x_adv = attacks.drop_fooled(attack, model, x, images.y, starts, **BUDGET, steps=steps)
    assert torch.equal(robustness.attack_batch(model, name, x, images.y, indices, **BUDGET, seed=3), x_adv)


@pytest.fixture
def alone(model):
    """The network on one image after the other, so that no logit depends on the rest of the batch."""
    forward = model.forward
    model.forward = lambda x: torch.cat([forward(image) for image in x.split(1)])
    return model


@pytest.mark.parametrize(("attack", "steps"), [(attacks.pgd, 1), (attacks.pgd, 4), (attacks.cw, 3)])
def test_dropping_fooled_images_is_the_plain_attack_without_forwards_in_vain(attack, steps, alone, images):
    x, y, watched = to_float(images.x), images.y, mock.Mock(side_effect=alone)
    budget = {"epsilon": 8 / 255, "step_size": 1 / 255}
    start = robustness.uniform_starts(x, torch.arange(40), 8 / 255, (0, "any"))
    iterates = [attack(alone, x, y, start, **budget, steps=step) for step in range(steps + 1)]
    correct = torch.stack([robustness.is_correct(alone, x_adv, y) for x_adv in iterates])
    assert torch.equal(attacks.drop_fooled(attack, watched, x, y, start, **budget, steps=steps), iterates[-1])
    sizes = [len(call.args[0]) for call in watched.call_args_list]
    assert sizes == [40, *correct.sum(1).tolist()][:steps]
    assert steps == 1 or len(set(sizes)) > 2, "images are fooled in several steps"
    still = attacks.drop_fooled(attack, watched, x, y, start, epsilon=8 / 255, step_size=0, steps=9)
    assert torch.equal(still, start) and watched.call_count == steps + 1, "no step would move an image"
    x, y, start = x[~correct[0]], y[~correct[0]], start[~correct[0]]  # fooled already
    assert torch.equal(attacks.drop_fooled(attack, watched, x, y, start, **budget, steps=9), start)
    assert watched.call_count == steps + 2


@pytest.mark.parametrize("name", ["clean", "fgsm", "pgd4", "cw"])
def test_correct_under_attack_depends_on_neither_batch_size_nor_selection(name, alone, images):
    judge = lambda **settings: mask_under(alone, images, name, step_size=1 / 255, **settings)
    mask, indices = judge(batch_size=1000), torch.tensor([3, 39, 31, 32, 8])
    assert mask.shape == (40,) and mask.dtype == torch.bool and 0 < mask.sum() < 40
    assert torch.equal(mask, judge(batch_size=7))
    assert torch.equal(mask[indices], judge(batch_size=2, indices=indices))
    assert judge(indices=indices[:0]).shape == (0,)


@pytest.mark.parametrize("name", ["clean", "fgsm", "pgd2", "cw"])
def test_an_attack_runs_in_eval_mode_and_puts_each_mode_back(name, model, images):
    model.train()
    model.bn2.eval()
    modes, seen = [part.training for part in model.modules()], []
    model.bn1.register_forward_hook(lambda *_: seen.append(model.bn1.training))
    mask_under(model, images, name)
    assert seen and not any(seen)
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("stray", [
    lambda x, epsilon: (x + 1.01 * epsilon).clamp(0, 1),
    lambda x, epsilon: (x - 1.01 * epsilon).clamp(0, 1),
    lambda x, epsilon: x.where(x > 0, x.new_tensor(-1e-3)),
    lambda x, epsilon: x.where(x < 1, x.new_tensor(1.001)),
    lambda x, epsilon: x.where(x > 0, x.new_tensor(math.nan)),
])  # fmt: skip
def test_an_attack_that_leaves_its_bounds_stops_the_evaluation(stray, monkeypatch):
    extreme = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    monkeypatch.setattr(robustness, "pgd", lambda model, x, y, start, epsilon, **_: stray(x, epsilon))
    with pytest.raises(UserError, match="fgsm left the epsilon ball"):
        robustness.attack_batch(None, "fgsm", extreme, None, torch.arange(2), **BUDGET, seed=0)


@pytest.mark.parametrize("name", ["clean", "pgd1", "fgsm"])
@pytest.mark.parametrize("label", [0, 3])
def test_weights_that_are_not_finite_stop_the_evaluation(name, label, model, images):
    model.linear.bias.data[3] = float("nan")
    with pytest.raises(UserError, match="finite"):
        mask_under(model, images.select(images.y == label), name)


@pytest.mark.parametrize(("classes", "targets"), [(4, 3), (10, 9), (100, 9)])
def test_auto_attack_is_its_authors_standard_version(classes, targets):
    """One stage of it: one restart, 100 steps, 5,000 queries, and no more targets than other classes."""
    from pyautoattack import AutoAttack

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
    x, y = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    with mock.patch.object(AutoAttack, "run_standard_evaluation", autospec=True, return_value=(x, y)) as run_it:
        assert robustness.auto_attack(model, "fab-t", x, y, epsilon=0.1, seed=5) is x
    (adversary, *_), batch_size = run_it.call_args.args, run_it.call_args.kwargs["batch_size"]
    assert adversary.attacks_to_run == ["fab-t"] and adversary.seed == 5 and batch_size == 2
    attacks = (adversary.apgd, adversary.apgd_targeted, adversary.fab, adversary.square)
    assert all(attack.n_restarts == 1 and attack.eps == 0.1 and attack.norm == "Linf" for attack in attacks)
    assert all(attack.n_iter == 100 for attack in attacks[:3]) and adversary.square.n_queries == 5000
    assert adversary.apgd_targeted.n_target_classes == adversary.fab.n_target_classes == targets


# Square ends early where it fools every image, which takes a larger ball.
@pytest.mark.parametrize(("stage", "epsilon"), [("apgd-ce", 0.1), ("apgd-t", 0.1), ("fab-t", 0.1), ("square", 0.4)])
def test_each_stage_of_auto_attack_fools_a_linear_network_and_touches_nothing(stage, epsilon):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval().requires_grad_(False)
    x = torch.rand(8, 3, 4, 4).to(memory_format=torch.channels_last)
    y, indices = model(x).argmax(1), torch.arange(8)
    random_state, budget = torch.get_rng_state(), {"epsilon": epsilon, "step_size": 0}
    draw = lambda seed, first=0: robustness.attack_batch(model, stage, x, y, indices + first, **budget, seed=seed)
    tracing = mock.patch.object(sys, "gettrace", return_value="a debugger's")
    with tracing, mock.patch.object(sys, "settrace") as settrace:
        x_adv = draw(0)
    assert settrace.call_args.args == ("a debugger's",), "the package ended its trace"
    fooled = ~robustness.is_correct(model, x_adv, y)
    assert fooled.sum() >= 4 and torch.equal(x_adv[~fooled], x[~fooled])
    assert torch.equal(x_adv, draw(0)) and torch.equal(torch.get_rng_state(), random_state)
    if stage != "fab-t":  # whose one restart is no random one
        assert not torch.equal(x_adv, draw(1)) and not torch.equal(x_adv, draw(0, first=8))


def masks_of(model, images, attacks):
    """The columns, their places by attack, their masks, and the warnings."""
    indices = torch.arange(len(images.y))
    columns, places = robustness.plan_columns(["target"], attacks, len(indices))
    record, _ = robustness.attack_columns({"target": model}, columns, images, indices, step_size=0, seed=0)
    return columns, places, robustness.read_masks([record]), record["warnings"]


NOISY = lambda _, __, logits: logits + 0.1 * torch.randn_like(logits)
ROUNDED = lambda _, inputs: (inputs[0] * 64).round() / 64


@pytest.mark.parametrize(("register", "change", "attacks", "sentence"), [
    ("register_forward_hook", lambda *_: None, "pgd1,aa-fast", None),
    ("register_forward_hook", NOISY, "apgd", "randomized defense"),
    ("register_forward_hook", lambda _, __, logits: logits.softmax(1), "apgd", "probability distribution"),
    ("register_forward_pre_hook", ROUNDED, "aa-fast", "points with zero gradient"),
    ("register_forward_pre_hook", ROUNDED, "fgsm,pgd1", None),  # not AutoAttack
])  # fmt: skip
def test_what_auto_attacks_own_checks_find_is_heard(register, change, attacks, sentence, model, images, monkeypatch):
    import pyautoattack

    def brief(adversary, version, set_version=pyautoattack.AutoAttack._set_version):
        set_version(adversary, version)
        adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = 2

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", brief)
    getattr(model, register)(change)
    planned = dict.fromkeys(attacks.split(","), (8, 8 / 255))
    *_, warnings = masks_of(model, images.select(slice(0, 8)), planned)
    assert all(warning.startswith("target: AutoAttack on images 0 to 7: ") for warning in warnings)
    assert warnings == [] if sentence is None else any(sentence in warning for warning in warnings), warnings


def test_the_check_of_square_sees_the_whole_test_set():
    """Four batches of 250; Square fools two images of the first and none of the others: not 0.2 %. With three it is."""
    columns, places = robustness.plan_columns(["target"], {"aa": (1000, 0.1)}, 1000)
    for fooled, heard in ((2, False), (3, True)):
        masks = (torch.arange(1000) < 500).repeat(5, 1)
        masks[-1, :fooled] = False
        records = [{"warnings": [f"target: there are {points} points!"]} for points in (3, 4)]
        points, *square = robustness.collect_warnings(columns, places, masks, records)
        assert points == "target: there are 3 points!" and len(square) == heard
        assert all("target: AutoAttack: Square Attack has decreased" in sentence for sentence in square)


def fake_auto_attack(monkeypatch, batch=math.inf, accident=None):
    """Replaces AutoAttack by a quick attack that depends on its seed. Returns its calls, (stage, images, seed). In the
    batch number `batch`, after its first stage, the accident happens."""
    calls = []

    def attack(model, stage, x, y, *, epsilon, seed):
        if stage == "apgd-t" and sum(call[0] == "apgd-ce" for call in calls) == batch:
            accident()
        calls.append((stage, x.numpy().tobytes(), seed))
        start = uniform_start(x, epsilon, make_generator("cpu", seed))
        step_size = epsilon * {"apgd-ce": 0.1, "apgd-t": 0.3, "fab-t": 0.5, "square": 0}[stage]
        return attacks.cw(model, x, y, start, epsilon=epsilon, step_size=step_size, steps=1)

    monkeypatch.setattr(robustness, "auto_attack", attack)
    return calls


def test_only_images_that_are_still_correct_are_attacked_and_stages_are_shared(model, images, monkeypatch):
    """Also by "paper": AutoAttack with an epsilon of its own on the first images."""
    calls = fake_auto_attack(monkeypatch)
    attacks = {"pgd2": (40, 8 / 255), "apgd": (40, 8 / 255), "aa": (40, 8 / 255), "aa-fast": (25, 0.031)}
    columns, places, masks, _ = masks_of(model, images, attacks)
    assert [column.attack for column in columns] == ["clean", "pgd2", *robustness.STAGES, "apgd-ce", "apgd-t"]
    assert places["target", "apgd"] == places["target", "aa"][:2] == [0, 2]
    x, attacked = to_float(images.x), []
    for column, mask in zip(columns[1:], masks[1:], strict=True):
        before = masks[column.before] & (torch.arange(40) < column.n)
        assert not (mask & ~before).any()
        if column.attack in robustness.STAGES:
            attacked.append((column.attack, x[before].numpy().tobytes()))
    assert [call[:2] for call in calls] == attacked
    clean, *_, aa = masks[places["target", "aa"]]
    assert aa.sum() < clean.sum() == round(40 * counted_accuracy(model, images)) < 40


def test_the_interval_is_wilsons():
    known = {(50, 100): (0.40383, 0.59617), (0, 10): (0, 0.27754), (10, 10): (0.72246, 1), (1, 10): (0.01788, 0.40415)}
    for (hits, n), interval in known.items():
        assert evaluate.wilson(hits, n) == pytest.approx(interval, abs=1e-5)


def test_the_worst_case_is_and_over_attacks_of_equal_network_epsilon_and_images():
    measured = [
        ({"network": "target", "attack": "clean"}, [1, 1, 1, 0]),
        ({"network": "target", "attack": "pgd10", "epsilon": 0.1}, [1, 1, 0, 0]),
        ({"network": "target", "attack": "cw", "epsilon": 0.1}, [0, 1, 1, 0]),
        ({"network": "target", "attack": "pgd50", "epsilon": 0.1}, [0, 0]),  # on fewer images
        ({"network": "target", "attack": "aa", "epsilon": 0.2}, [0, 0, 0, 0]),  # in a larger ball
        ({"network": "guide", "attack": "pgd10", "epsilon": 0.1}, [0, 0, 0, 0]),
    ]
    rows, masks = [{**row, "n": len(bits)} for row, bits in measured], [torch.tensor(bits) > 0 for _, bits in measured]
    (cell,) = evaluate.worst_case(rows, masks)
    assert (cell["network"], cell["attacks"], cell["epsilon"]) == ("target", ["pgd10", "cw"], 0.1)
    assert (cell["n"], cell["correct"], cell["accuracy"]) == (4, 1, 0.25)


def test_all_is_the_mean_over_five_attacks_and_absent_unless_each_was_measured():
    row = lambda network, name, n: {"network": network, "attack": name, **evaluate.accuracy_row(torch.arange(100) < n)}
    accuracies = {"clean": 90, "pgd10": 60, "pgd20": 50, "pgd50": 40, "cw": 30, "aa": 20}
    clean, *five = [row("target", *measured) for measured in accuracies.items()]
    table = lambda *rows: evaluate.table({"results": rows, "worst_case": []})
    assert table(clean, *five).splitlines()[-1].split() == ["target", "All", "40.00%"]
    for missing in five:
        others = [clean, *(row for row in five if row is not missing), {**missing, "network": "guide"}]
        assert "All" not in table(*others)


def test_the_protocols_are_what_they_say():
    """standard: 8/255 on all images. paper: AutoAttack at 0.031 on the first 1,000. The name says what was changed."""
    parser, words = evaluate.parser(), ["last.pt", "--attacks", "clean,pgd10,cw,apgd,aa", "--dataset"]
    planned = lambda *more, dataset="cifar10": evaluate.protocol(parser.parse_args([*words, dataset, *more]), 1200)
    standard = dict.fromkeys(("clean", "pgd10", "cw", "apgd", "aa"), (1200, 8 / 255))
    assert planned() == ("standard", standard)
    assert planned("--protocol", "paper") == ("paper", {**standard, "aa": (1000, 0.031)})
    name, plan = planned("--epsilon", "0.031", "--step-size", "2/255", "--images", "50")
    assert name == "standard except for --epsilon 0.031 --images 50" and plan["aa"] == (1200, 0.031)
    assert planned("--epsilon", "0")[1]["aa"] == (1200, 0.0)
    with pytest.raises(UserError, match="those of the first classes"):
        planned("--protocol", "paper", dataset="folder")


def evaluated(capsys, *argv):
    """Exit status, lines on standard output, lines on standard error."""
    capsys.readouterr()
    status = evaluate.main([str(argument) for argument in argv])
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err.splitlines()


def mistake(capsys, *argv):
    """The one line in which a command ends, with status 2."""
    status, _, err = evaluated(capsys, *argv)
    assert status == 2 and len(err) == 1, (status, err)
    return err[0]


def test_the_command_line_prints_and_writes_the_same_figures(run, images, model, tmp_path, capsys):
    file, attacks = tmp_path / "figures.json", ("clean", "pgd2", "cw")
    flags = ["--images", 40, "--network", "target,guide", "--batch-size", 16, "--epsilon", "8/255", "--json", file]
    status, out, err = evaluated(capsys, run / "last.pt", "--attacks", "clean, pgd2,cw", *flags)
    assert (status, err) == (0, []) and max(map(len, out[1:])) < 100
    report, matrix = json.loads(file.read_text()), np.load(tmp_path / "figures.npz")
    assert torch.equal(load_images("tiny", "test").x[matrix["indices"]], images.x)
    assert matrix["y"].tolist() == images.y.tolist()
    assert [(row["network"], row["attack"]) for row in report["results"]] == [*product(("target", "guide"), attacks)]
    for row in report["results"]:
        mask = torch.from_numpy(matrix[f"{row['network']} {row['attack']}"])
        assert row["n"] == 40 and row["name"] == "cnn" and row["accuracy"] == row["correct"] / 40
        assert row["correct"] == mask.sum() and row["interval"] == list(evaluate.wilson(row["correct"], 40))
        assert row.get("epsilon", 8 / 255) == 8 / 255 and row.get("step_size", 2 / 255) == 2 / 255
        assert any(line.split()[:3] == [row["network"], row["attack"], f"{row['accuracy']:.2%}"] for line in out)
        if row["network"] == "guide":
            judged = mask_under(model, images, row["attack"])
            assert torch.equal(mask, judged & torch.from_numpy(matrix["guide clean"]))
    for cell in report["worst_case"]:
        assert cell["correct"] == (matrix[f"{cell['network']} pgd2"] & matrix[f"{cell['network']} cw"]).sum()
    assert [cell["network"] for cell in report["worst_case"]] == ["target", "guide"] and report["warnings"] == []
    assert report["trained"]["epoch"] == 5 and report["trained"]["settings"]["dataset"] == "tiny"
    assert len(report["sha256"]) == 64 and report["seed"] == 0 and report["torch"] == torch.__version__
    assert sorted(os.listdir(tmp_path)) == ["figures.json", "figures.npz"]


def test_every_form_of_weights_is_attacked_as_itself(run, tmp_path, capsys):
    """The run's own, its average, the bare weights, and weights behind a normalisation."""
    content, normalisation = checkpoints.load(run / "last.pt"), {"mean": [0.04, 0.05, 0.06], "std": [0.8, 0.9, 1.0]}
    buffers = {name: torch.tensor(values) for name, values in normalisation.items()}
    torch.save({"state_dict": {**content["guide"], **buffers}}, tmp_path / "normalised.pt")
    bare = "--target cnn --dataset tiny"
    forms = [
        (run / "last.pt", "", "target", nn.Identity()),
        (run / "last.pt", "--weights ema", "ema", nn.Identity()),
        (run / "weights.pt", bare, "target", nn.Identity()),
        (tmp_path / "normalised.pt", bare, "guide", Normalize(**normalisation)),
    ]
    accuracies = []
    for number, (path, flags, role, normalise) in enumerate(forms):
        file = tmp_path / f"{number}.json"
        assert evaluated(capsys, path, *flags.split(), "--attacks", "clean", "--json", file)[0] == 0
        model = build_model("cnn", 10)
        model.load_state_dict(content[role])
        accuracies.append(json.loads(file.read_text())["results"][0]["accuracy"])
        counted = counted_accuracy(nn.Sequential(normalise, model), load_images("tiny", "test"))
        assert accuracies[-1] == pytest.approx(counted)
    assert accuracies[0] == accuracies[2] and len(set(accuracies)) == 3


def test_auto_attack_needs_its_package_and_its_targeted_loss_four_classes(monkeypatch):
    assert evaluate.check_auto_attack(["clean", "pgd10"], 2) == {}
    assert evaluate.check_auto_attack(["apgd"], 2) == evaluate.check_auto_attack(["aa"], 4) != {}
    with pytest.raises(UserError, match="need four classes, for their targeted loss; with 3, use apgd"):
        evaluate.check_auto_attack(["apgd", "aa"], 3)
    monkeypatch.setattr(evaluate.metadata, "version", mock.Mock(side_effect=evaluate.metadata.PackageNotFoundError))
    with pytest.raises(UserError, match="pip install pyautoattack"):
        evaluate.check_auto_attack(["apgd"], 10)


AA = ("--network", "guide", "--attacks", "clean,pgd2,apgd,aa", "--images", 40, "--batch-size", 16)


def timeless(file):
    """The report in `file` without what differs between two runs of a command, and the matrix beside it."""
    report = json.loads(file.read_text())
    report.pop("command")
    for row in report["results"]:
        for part in (row, *row.get("stages", [])):
            assert part.pop("seconds") >= 0
    return report, file.with_suffix(".npz").read_bytes()


def killed(*command):
    """A process of its own evaluates and is killed."""
    child = os.fork()
    if child == 0:
        os._exit(evaluate.main([str(word) for word in command]))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.fixture(scope="module")
def first_batch(run, tmp_path_factory):
    """What a progress file holds of an evaluation that was killed in its second batch."""
    file = tmp_path_factory.mktemp("killed") / "cut.json"
    with pytest.MonkeyPatch.context() as patch:
        fake_auto_attack(patch, 2, lambda: signal.raise_signal(signal.SIGKILL))
        killed(run / "last.pt", *AA, "--json", file)
    content = file.with_suffix(".json.progress").read_bytes()
    assert content.count(b"\n") == 2, "the evaluation and one batch"
    return content


@pytest.fixture
def interrupted(run, first_batch, tmp_path):
    """The command of that evaluation, and its progress file."""
    (tmp_path / "cut.json.progress").write_bytes(first_batch)
    return [run / "last.pt", *AA, "--json", tmp_path / "cut.json"], tmp_path / "cut.json.progress"


def test_an_interrupted_evaluation_resumes_to_the_same_figures(run, tmp_path, interrupted, monkeypatch, capsys):
    """After a kill that left half a line, and after Ctrl-C. No stage of a finished batch runs again."""
    command, progress = interrupted
    whole = tmp_path / "whole.json"
    expected = fake_auto_attack(monkeypatch)
    assert evaluated(capsys, run / "last.pt", *AA, "--json", whole)[0] == 0
    _, second, third = (number for number, call in enumerate(expected) if call[0] == "apgd-ce")
    progress.write_bytes(progress.read_bytes() + b'{"masks": ["01')
    calls = fake_auto_attack(monkeypatch, 2, mock.Mock(side_effect=KeyboardInterrupt))
    status, _, err = evaluated(capsys, *command, "--resume")
    assert (status, err) == (130, ["interrupted: 32 of 40 images are done; to go on, add --resume"])
    assert calls == expected[second : third + 1]
    calls = fake_auto_attack(monkeypatch)
    assert evaluated(capsys, *command, "--resume")[0] == 0 and calls == expected[third:]
    assert timeless(tmp_path / "cut.json") == timeless(whole)
    assert sorted(os.listdir(tmp_path)) == ["cut.json", "cut.npz", "whole.json", "whole.npz"], "litter"
    report = json.loads(whole.read_text())
    stages = report["results"][-1]["stages"]
    assert [stage["attack"] for stage in stages] == ["clean", *robustness.STAGES] and report["pyautoattack"]
    assert [stage["attacked"] for stage in stages[1:]] == [stage["correct"] for stage in stages[:-1]]
    described = {"attack": "apgd-t", "steps": 100, "restarts": 1, "targets": 9}
    assert {name: stages[2][name] for name in described} == described


@pytest.mark.parametrize(("flags", "says"), [
    ("", "is of an interrupted evaluation: continue it with --resume, or delete it"),
    ("--resume --batch-size 8", "batch size was 16, is 8: use 16, or delete"),
    ("--resume --attacks clean", "attacks was "),
    ("--resume --epsilon 0.0313725", "is standard except for --epsilon 0.0313725 --images 40: use standard"),
])  # fmt: skip
def test_an_interrupted_evaluation_is_continued_with_the_same_flags_alone(flags, says, interrupted, capsys):
    command, progress = interrupted
    content = progress.read_bytes()
    assert says in mistake(capsys, *command, *flags.split())
    assert progress.read_bytes() == content


CUT = lambda batch, n: {**batch, "masks": [mask[:n] for mask in batch["masks"]]}
DAMAGE = {  # the lines of the file instead of a head and a batch of 16 images
    "a text of somebody's": lambda head, batch: ["mine"],
    "another kind of head": lambda head, batch: [{"evaluation": []}, batch],
    "another list": lambda head, batch: [head, [1, 2]],
    "too many batches": lambda head, batch: [head, batch, batch, CUT(batch, 8), batch],
    "an image less": lambda head, batch: [head, CUT(batch, 15)],
    "a column less": lambda head, batch: [head, {**batch, "masks": batch["masks"][1:]}],
    "another bit": lambda head, batch: [head, {**batch, "masks": ["2" * len(mask) for mask in batch["masks"]]}],
    "a longer mask": lambda head, batch: [head, {**batch, "masks": [batch["masks"][0] * 2, *batch["masks"][1:]]}],
    "negative seconds": lambda head, batch: [head, {**batch, "seconds": [-1.0] * len(batch["seconds"])}],
    "NaN seconds": lambda head, batch: [head, {**batch, "seconds": [math.nan] * len(batch["seconds"])}],
    "warnings in numbers": lambda head, batch: [head, {**batch, "warnings": [1]}],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_progress_file_is_one_line_and_stays(name, interrupted, capsys):
    command, progress = interrupted
    lines = DAMAGE[name](*map(json.loads, progress.read_text().splitlines()))
    content = "".join(json.dumps(line) + "\n" for line in lines)
    progress.write_text(content)
    assert "cut.json.progress is" in mistake(capsys, *command, "--resume")
    assert progress.read_text() == content


def test_a_second_evaluation_of_the_same_name_is_refused(run, tmp_path, monkeypatch, capsys):
    """Also with --resume, and before the first batch is finished. Ctrl-C then leaves no file."""
    command, seen = [run / "last.pt", *AA, "--json", tmp_path / "figures.json"], []

    def another():
        seen.extend(mistake(capsys, *command, *flags) for flags in ((), ("--resume",)))
        raise KeyboardInterrupt

    fake_auto_attack(monkeypatch, 1, another)
    assert evaluated(capsys, *command)[::2] == (130, ["interrupted: nothing was saved yet"])
    assert os.listdir(tmp_path) == [] and len(seen) == 2 and all("another evaluation is at work" in e for e in seen)


@pytest.mark.parametrize("suffix", ["json", "npz"])
@pytest.mark.parametrize(("flags", "begun"), [([], False), (["--resume"], False), (["--resume"], True)])
def test_figures_are_never_overwritten(suffix, flags, begun, interrupted, tmp_path, capsys):
    command, progress = interrupted
    if not begun:
        progress.unlink()
    (tmp_path / f"cut.{suffix}").write_text("mine")
    assert f"cut.{suffix} exists already" in mistake(capsys, *command, *flags)
    assert (tmp_path / f"cut.{suffix}").read_text() == "mine"


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_a_kill_between_the_last_batch_and_the_end_is_resumed(suffix, interrupted, tmp_path, monkeypatch, capsys):
    command, progress = interrupted
    write = cli.write_text if suffix == "json" else lambda *_: None
    with monkeypatch.context() as patch:
        fake_auto_attack(patch)
        patch.setattr(cli, "write_text", lambda *text: (write(*text), signal.raise_signal(signal.SIGKILL)))
        killed(*command, "--resume")
    assert (tmp_path / f"cut.{suffix}").exists() and progress.exists()
    fake_auto_attack(monkeypatch, 0, lambda: pytest.fail("attacked again"))
    assert evaluated(capsys, *command, "--resume")[0] == 0 and not progress.exists()
    assert json.loads((tmp_path / "cut.json").read_text())["results"]


def test_a_full_disk_and_a_reader_that_left_name_the_file(run, tmp_path, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    command = [run / "last.pt", "--attacks", "clean", "--images", 20, "--json", file]
    with mock.patch.object(evaluate, "open", side_effect=OSError(28, "No space left on device"), create=True):
        assert mistake(capsys, *command) == f"error: cannot write {file}.progress: No space left on device"
    monkeypatch.setattr(evaluate, "table", mock.Mock(side_effect=BrokenPipeError))
    assert mistake(capsys, *command).endswith(f"the figures are in {file}")


def test_saved_images_are_in_the_ball_and_have_the_matrixs_verdicts(run, model, tmp_path, capsys):
    """Of an attack's images and indices, also where AutoAttack's stages each fooled some."""
    files = ["--json", tmp_path / "figures.json", "--save-images", tmp_path / "images.npz"]
    flags = ["--network", "guide", "--attacks", "clean,pgd4,cw,aa-fast", "--images", 20, "--batch-size", 8]
    assert evaluated(capsys, run / "last.pt", *flags, *files)[0] == 0
    matrix, saved = np.load(tmp_path / "figures.npz"), np.load(tmp_path / "images.npz")
    position = {index: place for place, index in enumerate(matrix["indices"].tolist())}
    images = load_images("tiny", "test").select(torch.from_numpy(matrix["indices"]))
    clean = to_float(images.x)
    for name in ("guide pgd4", "guide cw", "guide aa-fast"):
        places = torch.tensor([position[index] for index in saved[f"{name} indices"].tolist()])
        assert places.tolist() == np.flatnonzero(matrix["guide clean"]).tolist()
        assert saved[f"{name} y"].tolist() == images.y[places].tolist()
        x_adv, x = torch.from_numpy(saved[name]), clean[places]
        assert x_adv.dtype == torch.float32 and x_adv.min() >= 0 and x_adv.max() <= 1
        assert 0.02 < (x_adv - x).abs().max() <= 8 / 255 + 1e-6
        verdicts = robustness.is_correct(model, x_adv, images.y[places])
        assert verdicts.tolist() == matrix[name][places].tolist() and not verdicts.all()
    assert not list(tmp_path.glob("*.raw"))


@pytest.mark.parametrize(("there", "flags", "says"), [
    ("images.npz", [], "images.npz exists already: choose another name"),
    ("images.npz.raw", [], "images.npz.raw exists already: choose another --save-images"),
    ("images.npz.raw", ["--resume"], "images.npz.raw is not that of the interrupted evaluation"),
    ("", ["--resume"], "images.npz.raw is not that of the interrupted evaluation"),
])  # fmt: skip
def test_saved_images_overwrite_nothing(there, flags, says, run, tmp_path, monkeypatch, capsys):
    command = [run / "last.pt", "--attacks", "clean,pgd1", "--images", 40, "--batch-size", 16]
    command += ["--json", tmp_path / "figures.json", "--save-images", tmp_path / "images.npz"]
    if flags:
        first = lambda *_, **__: ({"masks": ["1" * 16] * 2, "seconds": [0, 0], "warnings": []}, torch.rand(2, 16, 1))
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "attack_columns", mock.Mock(side_effect=[first(), KeyboardInterrupt]))
            assert evaluated(capsys, *command)[0] == 130
        (tmp_path / "images.npz.raw").unlink()
    if there:
        (tmp_path / there).write_text("mine")
    assert says in mistake(capsys, *command, *flags)
    assert not there or (tmp_path / there).read_text() == "mine"


def test_saved_images_need_files_of_their_own(run, tmp_path, capsys):
    flags = lambda json, images: ["--json", tmp_path / json, "--save-images", tmp_path / images]
    assert "another name" in mistake(capsys, run / "last.pt", *flags("a.json", "a.npz"))
    assert "ends in .npz" in mistake(capsys, run / "last.pt", *flags("a.json", "b.pt"))
    assert "goes with --json" in mistake(capsys, run / "last.pt", "--save-images", tmp_path / "a.npz")


def own_network(classes=3, dtype=torch.float32):
    """Somebody's network for 64x64 images, which normalises them itself and may give half-precision logits."""

    class Cast(nn.Module):
        forward = lambda self, x: x.to(dtype)

    torch.manual_seed(0)
    normalise = Normalize([0.4, 0.5, 0.6], [0.2, 0.2, 0.3])
    layers = [nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 15 * 15, classes)]
    return nn.Sequential(normalise, *layers, Cast()).eval()


@pytest.mark.parametrize(("classes", "dtype", "attacks"), [
    (2, torch.float32, "clean,fgsm,pgd5,cw,apgd"),
    (3, torch.bfloat16, "clean,pgd5,apgd"),
    (4, torch.bfloat16, "clean,aa"),
])  # fmt: skip
def test_any_network_is_attacked(classes, dtype, attacks):
    """With any number of classes, size of images and precision of logits; nothing of it changes."""
    network, x = own_network(classes, dtype), torch.rand(12, 3, 64, 64)
    y = network(x).argmax(1)
    y[0] = (y[0] + 1) % classes
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report, masks = evaluate.attack_network(network, x, y, attacks, epsilon=16 / 255, batch_size=5)
    assert list(masks) == attacks.split(",") and masks["clean"].tolist() == [False] + [True] * 11
    for row, mask in zip(report["results"], masks.values(), strict=True):
        assert row["correct"] == mask.sum() < 12 and row["interval"] == evaluate.wilson(row["correct"], 12)
        assert row["attack"] in evaluate.table(report)
    assert masks[attacks.split(",")[-1]].sum() < 11
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())


def test_the_readmes_lines_for_an_own_network_run(capsys):
    block = re.search(r"```python\n(from evaluate .*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    network, x = own_network(), torch.rand(4, 3, 64, 64)
    namespace = {"network": network, "x": x, "y": network(x).argmax(1)}
    exec(block, namespace)
    assert len(block.splitlines()) <= 8 and namespace["masks"]["cw"].shape == (4,)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == [*namespace["masks"], "worst"]


@pytest.mark.parametrize(("change", "says"), [
    (lambda a: a["model"].train(), "the network is in train mode"),
    (lambda a: a.update(x=255 * a["x"]), r"pixels from .* to 25\d.*: they must be in \[0, 1\]"),
    (lambda a: a.update(x=a["x"] - 0.5), "the normalisation into the network"),
    (lambda a: a.update(x=torch.full_like(a["x"], math.nan)), "pixels from nan"),
    (lambda a: a.update(x=(255 * a["x"]).byte()), "x is torch.uint8"),
    (lambda a: a.update(x=a["x"][0]), r"x is .* \(3, 64, 64\)"),
    (lambda a: a.update(y=a["y"] + 2), "for 6 images and 3 logits"),
    (lambda a: a.update(y=a["y"][:4]), "for 6 images"),
    (lambda a: a.update(y=a["y"].float()), "y is torch.float32"),
    (lambda a: a.update(model=nn.Conv2d(3, 3, 64).eval()), r"gives \(1, 3, 1, 1\) for one image"),
    (lambda a: a.update(attacks="aa"), "need four classes"),
    (lambda a: a.update(attacks="pgd"), "unknown attack 'pgd'"),
    (lambda a: a.update(epsilon=8), "epsilon is 8, for pixels in"),
])  # fmt: skip
def test_a_mistake_with_an_own_network_is_one_clear_error(change, says):
    arguments = {"model": own_network(), "x": torch.rand(6, 3, 64, 64), "y": torch.arange(6) % 3, "attacks": "clean"}
    change(arguments)
    with pytest.raises(UserError, match=says):
        evaluate.attack_network(**arguments)
