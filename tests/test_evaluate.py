"""The evaluation: what it says of a network is true, repeatable, and checked by itself."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import mutant, mutant_module
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
import evaluate
import train_dynat
from attacks import uniform_start
from cli import UserError
from data import generator, load_images, subset
from models import build_model

BUDGET = {"epsilon": 8 / 255, "step_size": 2 / 255}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of a second or two, whose guide learned something."""
    out = tmp_path_factory.mktemp("run") / "dynat"
    flags = "--dataset tiny --train-images 320 --epochs 4 --steps 1 --batch-size 32 --eval-every 9 --out"
    assert train_dynat.main([*flags.split(), str(out)]) == 0
    return out


@pytest.fixture
def model(run):
    """The run's guide: right about most clean images, and easily fooled."""
    model = build_model("cnn", 10)
    model.load_state_dict(checkpoints.load(run / "last.pt")["guide"])
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return subset(load_images("tiny", "test"), 40, 0)


def check_below_clean(module, model, images):
    """An attack costs accuracy, or at least gains none, and more than an attack of nothing."""
    flags = {
        name: module.robust(model, images, name, **BUDGET, batch_size=20, seed=0)
        for name in ("clean", "fgsm", "pgd1", "pgd10", "cw")
    }
    shares = {name: float(stands.double().mean()) for name, stands in flags.items()}
    assert shares["clean"] == pytest.approx(module.accuracy(model, images)) and shares["clean"] > 0.5, shares
    assert max(shares["pgd10"], shares["cw"]) < shares["pgd1"] < shares["clean"], shares
    assert shares["fgsm"] < shares["clean"], shares


def test_accuracy_under_attack_is_below_clean_accuracy(model, images):
    check_below_clean(evaluate, model, images)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lambda z: -margin(z, y).sum()", "lambda z: margin(z, y).sum()"),
        ('name.removeprefix("pgd")', '"1"'),
        ("logits = model(x_adv)", "logits = model(x)"),
    ],
)
def test_an_evaluation_that_does_not_attack_is_rejected(old, new, model, images):
    with pytest.raises(AssertionError):
        check_below_clean(mutant_module(evaluate, (old, new)), model, images)


@pytest.mark.parametrize("attack", [evaluate.pgd, evaluate.cw])
def test_a_fooled_image_stays_fooled(attack, model, images):
    check_stays_fooled(attack, model, images)


def check_stays_fooled(attack, model, images):
    """An image that is fooled after k steps keeps that very iterate, the start included."""
    x, y = evaluate.pixels(images.x), images.y
    start = uniform_start(x, 8 / 255, generator("cpu", 0))
    before = start
    for steps in (1, 2, 4):
        fooled = ~evaluate.correct(model, before, y)
        after = attack(model, x, y, start, **BUDGET, steps=steps)
        assert fooled.any() and torch.equal(after[fooled], before[fooled])
        before = after


@pytest.mark.parametrize("attack", [evaluate.pgd, evaluate.cw])
def test_an_attack_that_moves_fooled_images_on_is_rejected(attack, model, images):
    with pytest.raises(AssertionError):
        check_stays_fooled(mutant(attack, ("active=lambda z: z.argmax(1) == y", "active=None")), model, images)


def begun(module, model, images, monkeypatch, name="pgd1", batch_size=40, seed=0):
    """The starts from which `robust` attacks, and its result."""
    seen = []

    def attack(model, x, y, start, **budget):
        seen.append(start)
        return start

    with monkeypatch.context() as patch:
        patch.setattr(module, "pgd", attack)
        stands = module.robust(model, images, name, **BUDGET, batch_size=batch_size, seed=seed)
    return torch.cat(seen), stands


def check_starts(module, model, images, monkeypatch):
    """The starts depend on seed, attack and image, never on the batch size, and fill the ball."""
    starts, stands = begun(module, model, images, monkeypatch)
    for batch_size in (1, 7, 39, 1000):
        others, same = begun(module, model, images, monkeypatch, batch_size=batch_size)
        assert torch.equal(starts, others) and torch.equal(stands, same), "the batch size matters"
    assert torch.equal(starts, begun(module, model, images, monkeypatch)[0]), "the same seed starts elsewhere"
    for other in ({"seed": 1}, {"name": "pgd2"}):
        assert not torch.equal(starts, begun(module, model, images, monkeypatch, **other)[0]), (
            f"{other} changes nothing"
        )
    shift = starts - evaluate.pixels(images.x)
    assert F.pdist(shift.flatten(1)).min() > 0.1, "two images share a start"
    inside = (starts > 0) & (starts < 1)
    assert 7.9 / 255 < shift[inside].abs().max() <= 8 / 255 + 1e-7 and abs(float(shift[inside].mean())) < 1e-3


def test_starts_depend_on_seed_attack_and_image_alone(model, images, monkeypatch):
    check_starts(evaluate, model, images, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("generator(x.device, *key, place)", "generator(x.device, *key, place % 7)"),
        ("generator(x.device, *key, place)", "generator(x.device, *key[:1], place)"),
        ("generator(x.device, *key, place)", "generator(x.device, *key[1:], place)"),
        ("generator(x.device, *key, place)", "None"),
        ("uniform_start(image, epsilon,", "uniform_start(image, epsilon / 2,"),
        ("places.tolist(), strict=True", "range(len(places)), strict=True"),
    ],
)
def test_starts_that_depend_on_anything_else_are_rejected(old, new, model, images, monkeypatch):
    with pytest.raises(AssertionError):
        check_starts(mutant_module(evaluate, (old, new)), model, images, monkeypatch)


def check_wilson(wilson):
    """Wilson's interval: known values, the share inside, within [0, 1], mirrored, narrower with more images."""
    known = {(50, 100): (0.40383, 0.59617), (0, 10): (0, 0.27754), (10, 10): (0.72246, 1), (1, 10): (0.01788, 0.40415)}
    for (hits, n), interval in known.items():
        assert wilson(hits, n) == pytest.approx(interval, abs=1e-5)

    @given(st.integers(1, 100_000), st.floats(0, 1))
    def for_any_share(n, share):
        hits = round(share * n)
        low, high = wilson(hits, n)
        assert 0 <= low <= hits / n <= high <= 1
        assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
        narrower = wilson(4 * hits, 4 * n)
        assert narrower[1] - narrower[0] < high - low

    for_any_share()


def test_the_interval_is_wilsons():
    check_wilson(evaluate.wilson)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("z = 1.959964", "z = 1.644854"),
        ("(hits + z * z / 2) / (n + z * z)", "hits / n"),
        ("+ z * z / 4", ""),
        ("z * z / 4)", "z * z / 2)"),
        ("max(0.0, centre - half)", "centre - half - 0.01"),
    ],
)
def test_another_interval_is_rejected(old, new):
    with pytest.raises(AssertionError):
        check_wilson(mutant(evaluate.wilson, (old, new)))


STRAYING = {
    "leaves the ball": lambda model, x, y, start, epsilon, **_: (x + 1.01 * epsilon).clamp(0, 1),
    "leaves the ball below": lambda model, x, y, start, epsilon, **_: (x - 1.01 * epsilon).clamp(0, 1),
    "leaves [0, 1]": lambda model, x, y, start, epsilon, **_: x.where(x > x.min(), x.new_tensor(-1e-3)),
    "exceeds 1": lambda model, x, y, start, epsilon, **_: x.where(x < x.max(), x.new_tensor(1.001)),
    "one NaN pixel": lambda model, x, y, start, **_: x.where(x > x.min(), x.new_tensor(float("nan"))),
}


def check_self_check(module, images, monkeypatch):
    """Each image that an attack returns is checked before it counts."""
    model = SimpleNamespace()
    extreme = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    for fault, attack in STRAYING.items():
        monkeypatch.setattr(module, "pgd", attack)
        try:
            module.attack_batch(model, "pgd1", extreme, torch.zeros(2), extreme, **BUDGET)
        except UserError:
            continue
        raise AssertionError(f"an attack that {fault} goes unseen")
    monkeypatch.setattr(module, "pgd", lambda model, x, y, start, **_: x)
    module.attack_batch(model, "pgd1", extreme, torch.zeros(2), extreme, **BUDGET)


def test_an_attack_that_leaves_its_bounds_stops_the_evaluation(images, monkeypatch):
    check_self_check(evaluate, images, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(x_adv >= x - epsilon) & ", ""),
        (" & (x_adv <= x + epsilon)", ""),
        (" & (x_adv >= 0)", ""),
        (" & (x_adv <= 1)", ""),
        ("if not allowed.all():", "if (~allowed).all():"),
    ],
)
def test_a_self_check_with_a_hole_is_rejected(old, new, images, monkeypatch):
    with pytest.raises(AssertionError):
        check_self_check(mutant_module(evaluate, (old, new)), images, monkeypatch)


def check_damaged_weights(module, model, images):
    """A weight that is not finite stops the evaluation, whichever images are attacked first."""
    model.linear.bias.data[3] = float("nan")
    for name in ("clean", "pgd1", "fgsm"):
        for label in (0, 3):
            few = images._replace(x=images.x[images.y == label], y=images.y[images.y == label])
            try:
                module.robust(model, few, name, **BUDGET, batch_size=20, seed=0)
            except UserError as error:
                assert "finite" in str(error)
            else:
                raise AssertionError(f"{name} evaluates a damaged network")


def test_weights_that_are_not_finite_stop_the_evaluation(model, images):
    check_damaged_weights(evaluate, model, images)


def test_an_evaluation_of_damaged_weights_is_rejected(model, images):
    with pytest.raises(AssertionError):
        check_damaged_weights(mutant_module(evaluate, ("if not logits.isfinite().all():", "if False:")), model, images)


def check_untouched(module, model, images):
    """Attacked in eval mode, and left as it was: modes, weights, BatchNorm buffers, gradients, random state."""
    model.train()
    model.bn2.eval()
    modes = [part.training for part in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    heard = []
    listener = model.bn1.register_forward_hook(lambda *_: heard.append(model.bn1.training))
    for name in ("clean", "fgsm", "pgd2", "cw"):
        module.robust(model, images, name, **BUDGET, batch_size=20, seed=0)
    module.accuracy(model, images)
    listener.remove()
    assert heard and not any(heard), "train mode"
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_evaluation_is_in_eval_mode_and_leaves_the_network_untouched(model, images):
    check_untouched(evaluate, model, images)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("with eval_mode(model), tqdm(", "with tqdm("),
        ("with eval_mode(model), torch.no_grad():\n        for", "with torch.no_grad():\n        for"),
        ("    hits = 0\n", "    hits = 0\n    model.eval()\n"),
    ],
)
def test_an_evaluation_that_touches_the_network_is_rejected(old, new, model, images):
    with pytest.raises(AssertionError):
        check_untouched(mutant_module(evaluate, (old, new)), model, images)


def evaluated(capsys, *argv):
    """What the command line prints and its exit status: status, lines on standard output, lines on standard error."""
    status = evaluate.main([str(argument) for argument in argv])
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err.splitlines()


def test_the_command_line_prints_and_writes_the_same_figures(run, tmp_path, capsys):
    file = tmp_path / "figures.json"
    status, out, err = evaluated(capsys, run / "last.pt", "--attacks", "clean, pgd2,cw", "--images", 50, "--network",
                                 "target,guide", "--epsilon", "8/255", "--json", file)  # fmt: skip
    assert (status, err) == (0, [])
    report = json.loads(file.read_text())
    assert [(row["network"], row["attack"]) for row in report["results"]] == [
        (network, attack) for network in ("target", "guide") for attack in ("clean", "pgd2", "cw")
    ]
    for row in report["results"]:
        assert row["n"] == 50 and row["name"] == "cnn" and row["accuracy"] == row["correct"] / 50
        assert row["interval"] == list(evaluate.wilson(row["correct"], 50))
        assert row.get("epsilon", 8 / 255) == 8 / 255 and row.get("step_size", 2 / 255) == 2 / 255
        assert any(f"{row['network']} " in line and f" {row['attack']} " in line and f"{row['accuracy']:.2%}" in line
                   for line in out)  # fmt: skip
    assert report["trained"]["epoch"] == 4 and report["trained"]["settings"]["dataset"] == "tiny"
    assert len(report["sha256"]) == 64 and report["seed"] == 0 and "torch" in report
    assert "50 test images" in "\n".join(out)


def test_bare_weights_are_attacked_once_their_network_is_named(run, capsys):
    flags = ("--images", 20, "--attacks", "clean,pgd1", "--batch-size", 20)
    _, with_run, _ = evaluated(capsys, run / "last.pt", *flags)
    status, bare, err = evaluated(capsys, run / "weights.pt", "--target", "cnn", "--dataset", "tiny", *flags)
    assert (status, err) == (0, [])
    figures = lambda lines: [line.rsplit("n =", 1)[0] for line in lines if line.startswith("target")]
    assert figures(bare) == figures(with_run) != []


def check_mistake(evaluated, argv, says):
    """One line on standard error that says what is wrong, exit status 2, nothing else."""
    status, _, err = evaluated(*argv)
    assert status == 2 and len(err) == 1 and err[0].startswith("error: ") and says in err[0], (status, err)


MISTAKES = {
    "an unknown attack": (["{run}/last.pt", "--attacks", "clean,pdg20"], "unknown attack 'pdg20': choose from clean"),
    "no steps": (["{run}/last.pt", "--attacks", "pgd0"], "unknown attack 'pgd0'"),
    "no attack": (["{run}/last.pt", "--attacks", ","], "--attacks names no attack"),
    "an unknown role": (["{run}/last.pt", "--network", "teacher"], "--network teacher: it is target, guide"),
    "no file": (["{run}/none.pt"], "there is no file"),
    "a folder": (["{run}"], "is a folder: name a checkpoint in it"),
    "a text file": (["{run}/log.jsonl"], "is no checkpoint"),
    "another network": (["{run}/last.pt", "--target", "wrn10-1"], "is cnn, not wrn10-1"),
    "bare weights, unnamed": (["{run}/weights.pt"], "holds bare weights: say --target NAME and --dataset NAME"),
    "bare weights of another": (["{run}/weights.pt", "--target", "wrn10-1", "--dataset", "tiny"], "of another network"),
    "an unknown network": (["{run}/weights.pt", "--target", "vgg", "--dataset", "tiny"], "unknown network 'vgg'"),
    "bare weights, guide": (["{run}/weights.pt", "--target", "cnn", "--dataset", "tiny", "--network", "guide"],
                            "holds no guide"),
    "too many images": (["{run}/last.pt", "--images", "1001"], "there are only 1000"),
    "no images": (["{run}/last.pt", "--images", "0"], "must be at least 1"),
    "an epsilon in words": (["{run}/last.pt", "--epsilon", "8/255px"], "is not a number like 0.031 or 8/255"),
    "an epsilon in pixels": (["{run}/last.pt", "--epsilon", "8"], "must be between 0 and 1"),
    "an abbreviated flag": (["{run}/last.pt", "--attack", "clean"], "unrecognized arguments"),
    "a device": (["{run}/last.pt", "--device", "tpu9"], "device 'tpu9' cannot be used here"),
    "no folder for the figures": (["{run}/last.pt", "--json", "{run}/none/figures.json"], "there is no folder"),
    "three classes": (["{run}/last.pt", "--dataset", "folder", "--data-dir", "{three}"], "10 classes, but"),
    "no data": (["{run}/last.pt", "--dataset", "folder", "--data-dir", "{run}/none"], "there is no folder"),
}  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder of images in three classes."""
    from PIL import Image

    root = tmp_path_factory.mktemp("three")
    for split in ("train", "test"):
        for number, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for copy in range(4):
                Image.new("RGB", (32, 32), (90 * number, 20 * copy, 0)).save(root / split / name / f"{copy}.png")
    return root


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(name, run, three, capsys):
    argv, says = MISTAKES[name]
    argv = [argument.format(run=run, three=three) for argument in argv]
    check_mistake(lambda *argv: evaluated(capsys, *argv), argv, says)


def test_a_network_of_another_class_count_is_refused(run, three, capsys):
    argv = [run / "weights.pt", "--target", "cnn", "--dataset", "folder", "--data-dir", three]
    check_mistake(lambda *argv: evaluated(capsys, *argv), argv, "linear.weight (10, 128) instead of (3, 128)")
