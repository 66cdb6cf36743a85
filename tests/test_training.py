"""What holds for DYNAT's update, and for whole runs through the command line."""

import hashlib
import json

import pytest
import torch
import torch.nn.functional as F
from cases import TinyNet, mutant, mutant_module

import engine
import evaluate
import train_dynat
from models import build_model
from train_dynat import dynat_step, main

ATTACK = {"epsilon": 0.1, "step_size": 0.03, "steps": 2}


def networks(target_seed=1, guide_seed=2):
    made = []
    for seed in (target_seed, guide_seed):
        torch.manual_seed(seed)
        made.append(TinyNet().double())
    return made


def batch(seed=0):
    draws = torch.Generator().manual_seed(seed)
    x = torch.rand(16, 3, 8, 8, generator=draws, dtype=torch.float64)
    return x, torch.randint(0, 10, (16,), generator=draws)


def sgd(*nets, momentum=0.9, weight_decay=2e-4):
    weights = [weight for net in nets for weight in net.parameters()]
    return torch.optim.SGD(weights, lr=0.1, momentum=momentum, weight_decay=weight_decay)


# the update


def check_guide_is_alone(step, inner):
    """The guide ends with the same bytes whatever the target and beta are, and as plain training on CE ends."""
    _, alone = networks()
    optimizer = sgd(alone)
    for seed in range(3):
        x, y = batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(alone(x), y).backward()
        optimizer.step()
    for target_seed, beta in ((1, 1.0), (5, 1.0), (1, 7.0), (1, 0.0)):
        target, guide = networks(target_seed)
        optimizer = sgd(target, guide)
        for seed in range(3):
            x, y = batch(seed)
            step(target, guide, optimizer, x, y, x, inner=inner, beta=beta, **ATTACK)
        for (name, value), expected in zip(guide.state_dict().items(), alone.state_dict().values(), strict=True):
            assert torch.equal(value, expected), name


@pytest.mark.parametrize("inner", [False, True])
def test_the_guide_trains_as_if_the_target_did_not_exist(inner):
    check_guide_is_alone(dynat_step, inner)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("target_loss(adv_logits, labels)", "target_loss(adv_logits, guide_logits.softmax(1))"),
        ("loss_guide + beta * loss_target", "(loss_guide + beta * loss_target) / (1 + beta)"),
        ("adv_logits = target(x_adv)", "adv_logits = target(x_adv) + guide(x_adv)"),
    ],
)
def test_a_guide_that_feels_the_target_is_rejected(old, new):
    with pytest.raises(AssertionError):
        check_guide_is_alone(mutant(dynat_step, (old, new)), inner=True)


def check_beta(step):
    moves = []
    for beta in (1.0, 0.25):
        target, guide = networks()
        before = target.linear.weight.detach().clone()
        x, y = batch()
        step(target, guide, sgd(target, guide, momentum=0, weight_decay=0), x, y, x, inner=True, beta=beta, **ATTACK)
        moves.append(target.linear.weight.detach() - before)
    assert moves[0].abs().max() > 1e-3
    torch.testing.assert_close(moves[1], 0.25 * moves[0], rtol=1e-9, atol=1e-12)


def test_beta_scales_the_targets_gradient_and_nothing_else():
    check_beta(dynat_step)


@pytest.mark.parametrize("new", ["loss_guide + loss_target", "beta * loss_guide + loss_target"])
def test_a_beta_elsewhere_is_rejected(new):
    with pytest.raises(AssertionError):
        check_beta(mutant(dynat_step, ("loss_guide + beta * loss_target", new)))


def check_batchnorm(step, clean_forward):
    """Of the target: r <- 0.81 r + 0.09 s_adv + 0.10 s_clean, or without the clean forward 0.9 r + 0.1 s_adv."""
    target, guide = networks()
    x, y = batch()
    conv = target.conv1.weight.detach().clone()
    optimizer = sgd(target, guide)
    x_adv, _ = step(target, guide, optimizer, x, y, x, inner=True, beta=1.0, clean_forward=clean_forward, **ATTACK)
    s_adv, s_clean = (F.conv2d(z, conv, padding=1).mean((0, 2, 3)) for z in (x_adv, x))
    expected = 0.09 * s_adv + 0.10 * s_clean if clean_forward else 0.1 * s_adv
    torch.testing.assert_close(target.bn1.running_mean, expected, rtol=1e-9, atol=1e-12)
    assert target.bn1.num_batches_tracked == (2 if clean_forward else 1)
    assert guide.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("clean_forward", [True, False])
def test_the_clean_forward_moves_the_targets_batchnorm(clean_forward):
    check_batchnorm(dynat_step, clean_forward)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("target(x)  # no loss term", "pass  # no loss term"),
        ("    with eval_mode(target):", "    if True:"),
        ("labels = dynamic_labels(guide_logits)", "labels = dynamic_labels(guide(x))"),
    ],
)
def test_other_batchnorm_updates_are_rejected(old, new):
    with pytest.raises(AssertionError):
        check_batchnorm(mutant(dynat_step, (old, new)), clean_forward=True)


def check_figures(step):
    target, guide = networks()
    x, y = batch()
    with torch.no_grad():
        labels = guide(x).argmax(1)
    guide.load_state_dict(networks()[1].state_dict())
    y[labels == y] = (y[labels == y] + 1) % 10  # exactly 4 of 16 dynamic labels are right
    y[:4] = labels[:4]
    _, figures = step(target, guide, sgd(target, guide), x, y, x, inner=True, beta=0.5, **ATTACK)
    assert list(figures) == ["loss", "loss_guide", "loss_target", "label_acc", "adv_acc"]
    assert not any(value.requires_grad for value in figures.values())
    assert figures["label_acc"].item() == 4 / 16
    assert figures["loss"].item() == pytest.approx(figures["loss_guide"].item() + 0.5 * figures["loss_target"].item())


def test_an_update_reports_the_share_of_right_labels_and_its_losses_detached():
    check_figures(dynat_step)


@pytest.mark.parametrize(
    ("old", "new"), [("(labels == y).float()", "(labels != y).float()"), ("loss.detach()", "loss")]
)
def test_other_figures_are_rejected(old, new):
    with pytest.raises(AssertionError):
        check_figures(mutant(dynat_step, (old, new)))


# settings


def settings_of(*argv):
    typed = vars(train_dynat.parser().parse_args(argv))
    return train_dynat.resolve({name: value for name, value in typed.items() if value is not None})


def test_the_defaults_are_the_papers_main_row():
    settings, out = settings_of("--dataset", "cifar10", "--target", "wrn34-10")
    expected = {
        "method": "dynat", "target": "wrn34-10", "guide": "resnet18", "epochs": 100, "batch_size": 128, "lr": 0.1,
        "momentum": 0.9, "weight_decay": 2e-4, "epsilon": 0.031, "step_size": 2 / 255, "steps": 10, "beta": 1.0,
        "clean_forward": True, "inner": False, "seed": 1,
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    assert settings == settings_of()[0]
    assert str(out) == "runs/dynat-cifar10-wrn34-10-s1"
    rates = [train_dynat.learning_rate(settings, epoch) for epoch in (1, 2, 75, 76, 90, 91, 100)]
    assert rates == pytest.approx([0.02, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_release_preset_differs_where_the_release_does():
    paper, release = settings_of()[0], settings_of("--preset", "release")[0]
    assert {name for name in paper if paper[name] != release[name]} == {"preset", "guide", "step_size"}
    assert (release["guide"], release["step_size"]) == ("resnet18-lbgat", 0.007)
    assert settings_of("--preset", "release", "--step-size", "2/255")[0]["step_size"] == 2 / 255  # a typed flag wins


def test_the_schedule_scales_with_the_epochs_unless_typed():
    rates = lambda *argv: [
        train_dynat.learning_rate(settings_of(*argv)[0], epoch) for epoch in range(1, int(argv[1]) + 1)
    ]
    assert rates("--epochs", "10") == pytest.approx([0.1] * 7 + [0.01, 0.001, 0.001])
    assert rates("--epochs", "5", "--lr-milestones", "4", "2") == pytest.approx([0.1, 0.01, 0.01, 0.001, 0.001])
    assert len(set(rates("--epochs", "1"))) == 1


def test_a_run_is_named_by_what_differs_from_the_defaults():
    name = lambda *argv: settings_of(*argv)[1].name
    assert name("--dataset", "tiny") == "dynat-tiny-cnn-s1"
    assert name("--dataset", "tiny", "--epochs", "10", "--seed", "3") == "dynat-tiny-cnn-s3"
    assert name("--dataset", "tiny", "--epochs", "2", "--beta", "1/2") == "dynat-tiny-cnn-s1-beta-0.5-epochs-2"
    assert name("--preset", "release") == "dynat-cifar10-wrn34-10-s1-preset-release"
    assert name("--no-clean-forward") == "dynat-cifar10-wrn34-10-s1-clean-forward-0"


# whole runs

SHORT = ["--dataset", "tiny", "--train-images", "96", "--epochs", "2", "--steps", "2", "--batch-size", "40"]


def digest(out):
    """The bytes of weights.pt, as a checksum: pytest explains unequal bytes at length, for minutes."""
    return hashlib.sha256((out / "weights.pt").read_bytes()).hexdigest()


def run(out, *argv, module=train_dynat):
    """A short run in the folder `out`; returns the checksum of its weights."""
    assert module.main([*SHORT, "--out", str(out), *argv]) == 0
    return digest(out)


def check_repeats(module, folder):
    first = run(folder / "a", "--seed", "1", module=module)
    assert run(folder / "b", "--seed", "1", module=module) == first
    assert run(folder / "c", "--seed", "2", module=module) != first
    logs = []
    for name in "ab":
        rows = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows])
    assert logs[0] == logs[1]


def test_two_runs_with_one_seed_give_identical_bytes_and_another_seed_others(tmp_path):
    check_repeats(train_dynat, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('torch.manual_seed(generator("cpu", settings["seed"], role).initial_seed())', "torch.seed()"),
        ("near_start(x, draws) if", "near_start(x, [other := torch.Generator(), other.seed()][0]) if"),
        ('settings = {"data_dir": None, **defaults, **typed}',
         'settings = {"data_dir": None, **defaults, **typed, "seed": 1}'),
    ],
)  # fmt: skip
def test_a_run_with_other_randomness_is_rejected(tmp_path, old, new):
    with pytest.raises(AssertionError):
        check_repeats(mutant_module(train_dynat, (old, new)), tmp_path)


def test_the_guide_of_a_run_does_not_depend_on_its_target(tmp_path):
    run(tmp_path / "a", "--target", "cnn")
    run(tmp_path / "b", "--target", "wrn10-1", "--beta", "3")
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["guide"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_directory_holds_what_the_design_says(tmp_path, capsys):
    run(tmp_path / "a", "--eval-every", "2")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "config.json",
        "last.pt",
        "log.jsonl",
        "weights.pt",
    ]
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    always = ["epoch", "lr", "loss", "loss_guide", "loss_target", "label_acc", "adv_acc"]
    assert list(rows[0]) == [*always, "seconds", "images_per_second"]
    assert list(rows[1]) == [*always, "test_acc", "guide_test_acc", "seconds", "images_per_second"]
    assert [row["epoch"] for row in rows] == [1, 2]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["settings"]["train_images"] == 96 and config["torch"] == torch.__version__
    last = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    weights = torch.load(tmp_path / "a" / "weights.pt", weights_only=True)
    assert last["epoch"] == 2 and last["settings"]["target"] == "cnn" and len(last["classes"]) == 10
    assert all(torch.equal(last["target"][key], weights[key]) for key in weights)
    build_model("cnn", 10).load_state_dict(weights)
    printed = capsys.readouterr().out
    assert "label_acc" in printed and f"python evaluate.py {tmp_path / 'a' / 'last.pt'}" in printed


def error_of(capsys, *argv, module=train_dynat):
    """Runs a command line that must fail: status 2, one line on standard error. Returns the line."""
    assert module.main(list(argv)) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def test_a_directory_in_use_is_refused_and_nothing_in_it_changes(tmp_path, capsys):
    out = tmp_path / "a"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert "--out" in error_of(capsys, *SHORT, "--out", str(out))
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, capsys):
    line = error_of(capsys, *SHORT, "--lr", "1e30", "--out", str(tmp_path / "a"))
    assert "finite" in line and "--lr" in line
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["config.json"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--dataset", "cifar11"], "--dataset"),
        (["--target", "resnet19"], "resnet19"),
        (["--guide", "wrn33-10"], "wrn33-10"),
        (["--method", "dynamo"], "--method"),
        (["--epsilon", "8/0"], "8/0"),
        (["--epsilon", "2"], "--epsilon"),
        (["--epsilon", "nan"], "nan"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "__import__('os')"], "--lr"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "1.5"], "whole number"),
        (["--batch-size", "0"], "--batch-size"),
        (["--train-images", "3001", "--dataset", "tiny"], "only 3000"),
        (["--dataset", "folder"], "--data-dir"),
        (["--dataset", "folder", "--data-dir", "/nowhere"], "/nowhere"),
        (["--device", "abacus", "--dataset", "tiny"], "abacus"),
        (["--epoch", "3"], "--epoch"),  # no abbreviations
        (["stray"], "stray"),
    ],
)
def test_a_mistake_ends_with_one_line_and_status_2(tmp_path, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in error_of(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_a_run_on_cifar_in_its_published_layout(name, classes, cifar_files, capsys):
    root, _, labels = cifar_files(name)
    out = root / "run"
    argv = ["--dataset", name, "--data-dir", str(root), "--target", "cnn", "--guide", "cnn"]
    assert main([*argv, "--epochs", "1", "--steps", "2", "--batch-size", "60", "--out", str(out)]) == 0
    last = torch.load(out / "last.pt", weights_only=True)
    assert last["target"]["linear.weight"].shape == (classes, 64) and len(last["classes"]) == classes
    report = out / "report.json"
    assert evaluate.main([str(out / "last.pt"), "--attacks", "clean,pgd10", "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["results"]
    assert [row["n"] for row in rows] == [50, 50] == [len(labels["test"])] * 2
    # the same figure, counted by hand from the published bytes
    model = build_model("cnn", classes)
    model.load_state_dict(torch.load(out / "weights.pt", weights_only=True))
    assert rows[0]["correct"] == sum(by_hand(model, root, name) == torch.tensor(labels["test"]))


def by_hand(model, root, name):
    import pickle

    file = {"cifar10": "cifar-10-batches-py/test_batch", "cifar100": "cifar-100-python/test"}[name]
    rows = torch.from_numpy(pickle.loads((root / file).read_bytes())["data"])
    with torch.no_grad():
        return model.eval()(rows.view(-1, 3, 32, 32) / 255).argmax(1)


# going on, averaging, held-out images


def check_resume(module, folder):
    """A run interrupted after its first epoch ends in the bytes of one that was not."""
    schedule = ["--lr-milestones", "2", "--ema", "0.9", "--val-images", "20"]
    whole = run(folder / "whole", *schedule, module=module)
    run(folder / "parts", *schedule, "--epochs", "1", module=module)
    assert module.main(["--out", str(folder / "parts"), "--resume", "--epochs", "2"]) == 0
    assert digest(folder / "parts") == whole
    a, b = (torch.load(folder / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    for role in ("target", "guide", "ema"):
        assert all(torch.equal(a[role][key], b[role][key]) for key in a[role]), role
    times = ("seconds", "images_per_second")
    assert [{k: v for k, v in row.items() if k not in times} for row in a["log"]] == [
        {k: v for k, v in row.items() if k not in times} for row in b["log"]
    ]


def test_a_resumed_run_ends_in_the_same_bytes(tmp_path):
    check_resume(train_dynat, tmp_path)


@pytest.mark.parametrize(
    "old",
    [
        'optimizer.load_state_dict(former["optimizer"])',
        'checkpoints.load_weights(averaged.module, former["ema"], "the checkpoint\'s average")',
        "averaged.n_averaged.fill_(1)",
    ],
)
def test_a_resume_that_forgets_something_is_rejected(tmp_path, monkeypatch, old):
    monkeypatch.setattr(engine, "restore", mutant(engine.restore, (old, "pass")))
    with pytest.raises(AssertionError):
        check_resume(train_dynat, tmp_path)


def test_resume_starts_a_run_that_has_no_checkpoint_yet_and_refuses_other_flags(tmp_path, capsys):
    out = tmp_path / "a"
    out.mkdir()  # as a run leaves it that is killed in its first epoch
    first = run(out, "--resume")
    assert run(tmp_path / "b") == first
    assert "beta" in error_of(capsys, "--resume", "--out", str(out), "--beta", "2")
    assert "--resume" in error_of(capsys, *SHORT, "--out", str(out))
    assert digest(out) == first


def test_held_out_images_select_the_best_epoch_and_are_not_trained_on(tmp_path, monkeypatch):
    seen = []
    batches = train_dynat.train_batches

    def watched(images, *args):
        seen.append(images.x)
        return batches(images, *args)

    monkeypatch.setattr(train_dynat, "train_batches", watched)
    values = iter([2 / 3, 1 / 3])  # the first epoch is the best
    monkeypatch.setattr(train_dynat, "accuracy", lambda _, __, attack, ___: next(values) if attack == "pgd10" else 0.5)
    run(tmp_path / "a", "--val-images", "50")
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [row["val_pgd"] for row in rows] == pytest.approx([2 / 3, 1 / 3])
    assert torch.load(tmp_path / "a" / "best.pt", weights_only=True)["epoch"] == 1
    held_out = train_dynat.subset(train_dynat.load_images("tiny", "train"), 50, seed=1).x
    trained = {bytes(image.numpy().tobytes()) for image in seen[0]}
    assert not trained & {bytes(image.numpy().tobytes()) for image in held_out}


def test_the_average_follows_the_target(tmp_path):
    """One update with decay d: the first average is the target itself; two: d * former + (1 - d) * target."""
    for epochs in (1, 2):
        run(
            tmp_path / str(epochs),
            "--epochs",
            str(epochs),
            "--batch-size",
            "96",
            "--ema",
            "3/4",
            "--lr-milestones",
            "9",
        )
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in "12")
    key = "linear.weight"
    assert torch.equal(one["ema"][key], one["target"][key])
    torch.testing.assert_close(two["ema"][key], 0.75 * one["target"][key] + 0.25 * two["target"][key])
