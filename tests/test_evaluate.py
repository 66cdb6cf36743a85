"""The evaluation: what it says of a network is true, repeatable, and checked by itself."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import counted_accuracy, mutant, mutant_module
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import checkpoints
import evaluate
import train_dynat
from attacks import uniform_start
from benchmarks import evaluation
from cli import UserError
from data import Images, generator, load_images, subset
from models import build_model

PGD = evaluate.pgd  # as it is where a test puts another in its place
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
    assert shares["clean"] == pytest.approx(counted_accuracy(model, images)) and shares["clean"] > 0.5, shares
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
    """The starts from which `robust` attacks, in pgd1 or in a first batch of all images, and its result."""
    seen = []

    def attack(model, x, y, start, **budget):
        seen.append(start)
        return PGD(model, x, y, start, **budget)

    with monkeypatch.context() as patch:
        patch.setattr(module, "pgd", attack)
        stands = module.robust(model, images, name, **BUDGET, batch_size=batch_size, seed=seed)
    return torch.cat(seen)[: len(images.y)], stands


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
        ("generator(x.device, *key, block)", "generator(x.device, *key)"),
        ("generator(x.device, *key, block)", "generator(x.device, *key[:1], block)"),
        ("generator(x.device, *key, block)", "generator(x.device, *key[1:], block)"),
        ("generator(x.device, *key, block)", "None"),
        ("uniform_start(whole, epsilon,", "uniform_start(whole, epsilon / 2,"),
        ("places[members] % BLOCK", "torch.arange(int(members.sum()))"),
        ("starts(x[len(x_adv) :], fresh,", "starts(x[len(x_adv) :], fresh - fresh[0],"),
    ],
)
def test_starts_that_depend_on_anything_else_are_rejected(old, new, model, images, monkeypatch):
    with pytest.raises(AssertionError):
        check_starts(mutant_module(evaluate, (old, new)), model, images, monkeypatch)


class Alone(nn.Module):
    """The network on one image after the other, so that no logit depends on the rest of the batch. `seen` records each
    forward: its number of images, and whether a gradient can follow."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        self.seen.append((len(x), x.requires_grad))
        return torch.cat([self.model(image) for image in x.split(1)])


REFILLED = {"epsilon": 8 / 255, "step_size": 1 / 255}


@pytest.fixture(scope="module")
def alone(run):
    model = build_model("cnn", 10)
    model.load_state_dict(checkpoints.load(run / "last.pt")["guide"])
    return Alone(model.eval())


@pytest.fixture(scope="module")
def plain(alone, images):
    """What the plain call makes of the whole set: its steps, x_adv, and how many steps fool each image, if any do."""
    x, y, places, made = evaluate.pixels(images.x), images.y, torch.arange(40), {}
    for name, attack, steps in (("pgd1", evaluate.pgd, 1), ("pgd4", evaluate.pgd, 4), ("cw", evaluate.cw, 3)):
        start = evaluate.starts(x, places, REFILLED["epsilon"], (0, name))
        iterates = [attack(alone, x, y, start, **REFILLED, steps=step) for step in range(steps + 1)]
        standing = [evaluate.correct(alone, x_adv, y) for x_adv in iterates]
        made[name] = steps, iterates[-1], torch.stack(standing[:-1]).sum(0)
    assert {0, 1, 4} <= set(made["pgd4"][2].tolist()), "images that are fooled at once, later, and never"
    return made


def check_refilled(module, alone, images, plain, monkeypatch):
    """Whatever the batch size and the images attacked: x_adv, logits and flags of the plain call, every image once. No
    forward for an image that does not need it; the batches are full as long as any image waits."""
    monkeypatch.setitem(module.SETTINGS["cw"], "steps", plain["cw"][0])

    @given(st.sampled_from(sorted(plain)), st.sampled_from((1, 2, 5, 8, 15, 39, 41)), st.sets(st.integers(0, 39)))
    @settings(max_examples=30, phases=[Phase.generate])  # mutants fail here by design: no time is spent on shrinking
    def for_any_batch(name, batch_size, left_out):
        steps, x_adv, needed = plain[name]
        attacked = torch.tensor([place not in left_out for place in range(40)])
        budget = {**REFILLED, "batch_size": batch_size, "seed": 0}
        alone.seen.clear()
        found = list(module.attacked(alone, name, images, attacked.nonzero().squeeze(1), **budget))
        moved = [size for size, differentiable in alone.seen if differentiable]
        judged = [size for size, differentiable in alone.seen if not differentiable]
        assert sum(moved) == int((needed + 1).clamp(max=steps)[attacked].sum()), "another number of steps"
        assert sum(judged) == int((needed == steps)[attacked].sum()), "another number of last forwards"
        assert moved == sorted(moved, reverse=True), "a slot stayed empty while images waited"
        assert moved[:1] == [min(batch_size, int(attacked.sum()))][: len(moved)]
        assert all(size >= batch_size for size in judged[:-1])
        assert (
            sorted(place for places, *_ in found for place in places.tolist()) == attacked.nonzero().flatten().tolist()
        )
        for places, made, logits in found:
            assert torch.equal(made, x_adv[places]), "another image"
            assert torch.equal(logits, alone(made)), "logits of something else"

    for_any_batch()
    for name, (_, x_adv, _) in plain.items():
        attacked = torch.arange(40) % 3 > 0
        budget = {**REFILLED, "batch_size": 7, "seed": 0, "found": module.begin(attacked)}
        stands = module.robust(alone, images, name, **budget)
        assert torch.equal(stands, evaluate.correct(alone, x_adv, images.y) & attacked)


def test_the_refilled_attack_is_the_plain_one_and_wastes_no_forward(alone, images, plain, monkeypatch):
    check_refilled(evaluate, alone, images, plain, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("taken[further], x_adv[further]", "taken[: len(batch[further])], x_adv[further]"),
        ("torch.zeros_like(fresh)", "torch.ones_like(fresh)"),
        ("taken[further], x_adv[further]", "taken[further], x_adv[: len(batch[further])]"),
        ("starts(x[len(x_adv) :], fresh,", "starts(x[len(x_adv) :], fresh + 1,"),
        ("starts(x[len(x_adv) :], fresh,", "starts(x[len(x_adv) :], torch.arange(len(fresh)),"),
        ("~fooled & (taken < steps)", "taken < steps"),
        ("~fooled & (taken == steps)", "taken == steps"),
        ("~fooled & (taken < steps)", "~fooled & (taken <= steps)"),
        ("step_size=step_size, steps=1)", "step_size=step_size, steps=2)"),
        ("free = batch_size - len(batch)", "free = 0 if len(batch) else batch_size"),
        ("free = batch_size - len(batch)", "free = batch_size"),
        ("if len(ended) >= batch_size or (", "if len(ended) or ("),
        ("    ended, ended_x_adv = ended[:0], ended_x_adv[:0]\n", "    ended = ended\n"),
        ("yield batch[fooled], x_adv[fooled], logits[fooled]", "pass"),
        ("x_adv[fooled], logits[fooled]", "x_adv[fooled], logits[: len(batch[fooled])]"),
    ],
)
def test_a_refilled_attack_that_differs_or_wastes_is_rejected(old, new, alone, images, plain, monkeypatch):
    with pytest.raises((AssertionError, IndexError, UserError)):
        check_refilled(mutant_module(evaluate, (old, new)), alone, images, plain, monkeypatch)


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
            module.attack_batch(model, "pgd1", extreme, torch.zeros(2), torch.arange(2), **BUDGET, seed=0)
        except UserError:
            continue
        raise AssertionError(f"an attack that {fault} goes unseen")
    monkeypatch.setattr(module, "pgd", lambda model, x, y, start, **_: x)
    module.attack_batch(model, "pgd1", extreme, torch.zeros(2), torch.arange(2), **BUDGET, seed=0)


def test_an_attack_that_leaves_its_bounds_stops_the_evaluation(images, monkeypatch):
    check_self_check(evaluate, images, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(x_adv >= x - epsilon - slack) & ", ""),
        (" & (x_adv <= x + epsilon + slack)", ""),
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
        ("    with eval_mode(model), tqdm(", "    model.eval()\n    with tqdm("),
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


THREE = ["--target", "cnn", "--dataset", "folder", "--data-dir", "{three}"]
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
    "the paper's protocol, changed": (["{run}/last.pt", "--protocol", "paper", "--epsilon", "0.031", "--images", "9"],
                                      "leave out --epsilon 0.031 and --images 9"),
    "the paper's protocol on a folder": (["{three}/three.pt", *THREE, "--protocol", "paper"], "the first classes"),
    "targets among three classes": (["{three}/three.pt", *THREE, "--attacks", "apgd,aa"],
                                    "aa needs at least four classes, for its targeted loss; with 3, use apgd"),
    "no data": (["{run}/last.pt", "--dataset", "folder", "--data-dir", "{run}/none"], "there is no folder"),
}  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder of images in three classes, with a network for them."""
    from PIL import Image

    root = tmp_path_factory.mktemp("three")
    for split in ("train", "test"):
        for number, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for copy in range(4):
                Image.new("RGB", (32, 32), (90 * number, 20 * copy, 0)).save(root / split / name / f"{copy}.png")
    torch.save(build_model("cnn", 3).state_dict(), root / "three.pt")
    return root


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(name, run, three, capsys):
    argv, says = MISTAKES[name]
    argv = [argument.format(run=run, three=three) for argument in argv]
    check_mistake(lambda *argv: evaluated(capsys, *argv), argv, says)


def test_a_network_of_another_class_count_is_refused(run, three, capsys):
    argv = [run / "weights.pt", "--target", "cnn", "--dataset", "folder", "--data-dir", three]
    check_mistake(lambda *argv: evaluated(capsys, *argv), argv, "linear.weight (10, 64) instead of (3, 64)")


class Recorded(Exception):
    pass


def check_auto_attack_settings(module, monkeypatch):
    """The package's standard version, one attack of it: one restart, 100 steps, 5,000 queries, possible targets."""
    import pyautoattack

    def record(adversary, x, y, batch_size):
        targets = possible[adversary.model[1].out_features]
        attacks = (adversary.apgd, adversary.apgd_targeted, adversary.fab, adversary.square)
        assert all(attack.n_restarts == 1 and attack.eps == 0.1 and attack.norm == "Linf" for attack in attacks)
        assert all(attack.n_iter == 100 for attack in attacks[:3]) and adversary.square.n_queries == 5000
        assert adversary.attacks_to_run == ["fab-t"] and adversary.seed == 5 and batch_size == len(x)
        assert adversary.apgd_targeted.n_target_classes == adversary.fab.n_target_classes == targets
        raise Recorded

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", record)
    x, y = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    possible = {4: 3, 9: 8, 10: 9, 100: 9}
    for classes in possible:
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
        with pytest.raises(Recorded):
            module.auto_attack(model, "fab-t", x, y, epsilon=0.1, seed=5)


def test_auto_attack_is_its_authors_standard_version(monkeypatch):
    check_auto_attack_settings(evaluate, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('version="standard",', 'version="custom", attacks=[stage],'),
        ("min(TARGETS, classes - 1)", "TARGETS"),
        ("min(TARGETS, classes - 1)", "min(TARGETS, classes)"),
        ("adversary.attacks_to_run = [stage]", "pass"),
        ("eps=epsilon", "eps=8 / 255"),
        ("seed=seed, device", "seed=None, device"),
    ],
)
def test_another_auto_attack_is_rejected(old, new, monkeypatch):
    with pytest.raises(AssertionError):
        check_auto_attack_settings(mutant_module(evaluate, (old, new)), monkeypatch)


# Square ends early where it fools every image, which takes a larger ball.
@pytest.mark.parametrize(("stage", "epsilon"), [("apgd-ce", 0.1), ("apgd-t", 0.1), ("fab-t", 0.1), ("square", 0.4)])
def test_each_stage_of_auto_attack_fools_a_linear_network_and_touches_nothing(stage, epsilon):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval().requires_grad_(False)
    x = torch.rand(8, 3, 4, 4).to(memory_format=torch.channels_last)
    y = model(x).argmax(1)
    random_state = torch.get_rng_state()
    places = torch.arange(8)
    draw = lambda seed: evaluate.attack_batch(model, stage, x, y, places, epsilon=epsilon, step_size=0, seed=seed)
    x_adv = draw(0)
    fooled = ~evaluate.correct(model, x_adv, y)
    assert fooled.sum() >= 4 and torch.equal(x_adv[~fooled], x[~fooled])
    assert torch.equal(x_adv, draw(0)) and torch.equal(torch.get_rng_state(), random_state)
    if stage != "fab-t":  # whose one restart is no random one
        assert not torch.equal(x_adv, draw(1))


AA = ("--attacks", "clean,pgd2,apgd,aa", "--images", 40, "--batch-size", 8)


def fingerprints(x):
    return [image.numpy().tobytes() for image in x]


def interruptible(module, monkeypatch, after=None):
    """Replaces AutoAttack by a quick attack that depends on its seed; every call, of this and of a step of PGD, is
    recorded: its name and its images, in AutoAttack with the seed. Ctrl-C comes at the call number `after`."""
    calls = []

    def attack(model, stage, x, y, *, epsilon, seed):
        note(stage, x, seed)
        start = uniform_start(x, epsilon, generator("cpu", seed))
        step_size = epsilon * {"apgd-ce": 0.1, "apgd-t": 0.5, "fab-t": 1, "square": 0}[stage]
        return module.cw(model, x, y, start, epsilon=epsilon, step_size=step_size, steps=1)

    def pgd(model, x, y, start, **budget):
        note("pgd", x)
        return PGD(model, x, y, start, **budget)

    def note(name, x, *seed):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append((name, fingerprints(x), *seed))

    monkeypatch.setattr(module, "auto_attack", attack)
    monkeypatch.setattr(module, "pgd", pgd)
    return calls


def timeless(file):
    """The report in `file` without what differs between two runs of the same command: the times and the command."""
    report = json.loads(file.read_text())
    report.pop("command")
    for row in report["results"]:
        for part in (row, *row.get("stages", [])):
            assert part.pop("seconds") >= 0
    return report


def check_resume(module, run, images, folder, monkeypatch, capsys):
    """An evaluation cut short at any round and resumed attacks what is not done, and ends in the same report."""
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    file, network = folder / "whole.json", [str(run / "last.pt"), "--network", "guide", *map(str, AA)]
    with monkeypatch.context() as patch:
        expected_calls = interruptible(module, patch)
        assert module.main([*network, "--json", str(file)]) == 0
    expected = timeless(file)
    assert [row["attack"] for row in expected["results"]] == ["clean", "pgd2", "apgd", "aa"]
    everything = fingerprints(evaluate.pixels(images.x))
    for after in (0, 4, len(expected_calls) - 1):
        file = folder / "cut.json"
        file.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            calls = interruptible(module, patch, after)
            assert module.main([*network, "--json", str(file)]) == 130 and not file.exists()
            assert len(calls) == after
        with monkeypatch.context() as patch:
            interruptible(module, patch, 0)
            capsys.readouterr()
            assert module.main([*network, "--json", str(file)]) == 2
            assert "continue it with --resume" in capsys.readouterr().err
            assert module.main([*network, "--json", str(file), "--resume", "--seed", "3"]) == 2
            assert "with another seed, another test images: delete it first" in capsys.readouterr().err
        kept = checkpoints.load(folder / "cut.json.progress")
        # The same bytes are another network under another name.
        assert kept["identity"]["target"] == "cnn" and kept["identity"]["seed"] == 0
        begun = [known["done"] for key, known in kept["known"].items() if "pgd2" in key]
        done = begun[0] if begun else torch.zeros(40, dtype=torch.bool)
        assert (after < 4) == (not done.any()) and (after > 4) == bool(done.all())
        with monkeypatch.context() as patch:
            more = interruptible(module, patch)
            assert module.main([*network, "--json", str(file), "--resume"]) == 0
        stages = [call for call in calls + more if call[0] != "pgd"]
        assert stages == [call for call in expected_calls if call[0] != "pgd"], "repeated, left out or made otherwise"
        again = {image for name, attacked, *_ in more if name == "pgd" for image in attacked}
        assert again == {image for image, so in zip(everything, done.tolist(), strict=True) if not so}
        assert timeless(file) == expected
        assert sorted(entry.name for entry in folder.iterdir()) == ["cut.json", "whole.json"], "litter"


def test_an_interrupted_evaluation_resumes_to_the_same_figures(run, images, tmp_path, monkeypatch, capsys):
    check_resume(evaluate, run, images, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('(found["attacked"] & ~found["done"]).nonzero()', 'found["attacked"].nonzero()'),
        ('found["done"][batch] = True', 'found["done"][:] = True'),
        ("            keep()\n", ""),
        ('self.attacks = content["known"]', "pass"),
        ("int(places[0]))", "time.perf_counter())"),
        ("    progress.end()\n", ""),
        ("if not resume:", "if False:"),
    ],
)
def test_a_resume_that_forgets_or_repeats_is_rejected(old, new, run, images, tmp_path, monkeypatch, capsys):
    with pytest.raises(AssertionError):
        check_resume(mutant_module(evaluate, (old, new)), run, images, tmp_path, monkeypatch, capsys)


def check_saved_in_time(module, folder, monkeypatch):
    """The progress is written at once and then every SAVE_EVERY seconds, not at each call: it waits for the disk."""
    now, written = [100.0], []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(checkpoints, "save", lambda *_: written.append(now[0]))
    progress = module.Progress(folder / "progress", {}, resume=False)
    for _ in range(100):
        progress.keep()
        now[0] += module.SAVE_EVERY / 4
    assert written == [100.0 + module.SAVE_EVERY * save for save in range(25)]


def test_progress_is_saved_every_few_seconds(tmp_path, monkeypatch):
    check_saved_in_time(evaluate, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if time.monotonic() < self.due:", "if False:"),
        ("self.due = 0", "self.due = time.monotonic() + SAVE_EVERY"),
        ("self.due = time.monotonic() + SAVE_EVERY", "self.due = math.inf"),
    ],
)
def test_progress_that_is_saved_at_another_time_is_rejected(old, new, tmp_path, monkeypatch):
    with pytest.raises(AssertionError):
        check_saved_in_time(mutant_module(evaluate, (old, new)), tmp_path, monkeypatch)


def test_auto_attack_attacks_what_still_stands_and_shares_its_stages(run, tmp_path, monkeypatch, capsys):
    calls = interruptible(evaluate, monkeypatch)
    file = tmp_path / "figures.json"
    status, out, err = evaluated(capsys, run / "last.pt", "--network", "guide", *AA, "--json", file)
    assert (status, err) == (0, [])
    report = json.loads(file.read_text())
    clean, pgd, apgd, aa = report["results"]
    batches = math.ceil(clean["correct"] / 8)
    assert sum("apgd-ce" in call for call in calls) == batches, "apgd's stage is aa's first one and runs once"
    standing = clean["correct"]
    assert [stage["attack"] for stage in aa["stages"]] == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    for stage in aa["stages"][1:]:
        assert stage["attacked"] == standing >= stage["correct"]
        standing = stage["correct"]
    assert aa["correct"] == standing < apgd["correct"] < clean["correct"]
    assert aa["stages"][2] | {"seconds": 0, "attacked": 0, "correct": 0} == {
        "attack": "apgd-t", "steps": 100, "restarts": 1, "targets": 9, "attacked": 0, "correct": 0, "seconds": 0
    }  # fmt: skip
    assert pgd["steps"] == 2 and report["pyautoattack"] and report["protocol"] == "standard except for --images 40"
    (cell,) = report["together"]
    assert cell["attacks"] == ["clean", "pgd2", "apgd", "aa"] and cell["n"] == 40
    assert cell["correct"] <= min(pgd["correct"], aa["correct"])
    heading = next(line for line in out if line.startswith("|  |"))
    assert heading == "|  | clean | PGD-2 | APGD | AA | All |"
    mean = (pgd["accuracy"] + apgd["accuracy"] + aa["accuracy"]) / 3
    assert any(line.startswith("| guide cnn |") and line.endswith(f"| {mean:.2%} |") for line in out)


def check_nobody_left(module, model, images):
    """Where no image stands any more, a stage of AutoAttack attacks none and leaves none."""
    found = module.begin(torch.zeros(40, dtype=torch.bool))
    for stage in ("apgd-ce", "apgd-t", "fab-t", "square"):
        try:
            stands = module.robust(model, images, stage, **BUDGET, batch_size=20, seed=0, found=found)
        except IndexError:
            raise AssertionError("an empty batch was attacked") from None
        assert not stands.any() and not found["done"].any()


def test_a_stage_of_auto_attack_can_have_nothing_left_to_attack(model, images):
    check_nobody_left(evaluate, model, images)


def test_a_stage_that_attacks_nobody_is_rejected(model, images):
    with pytest.raises(AssertionError):
        check_nobody_left(mutant_module(evaluate, (" if len(places) else ()", "")), model, images)


def test_an_evaluation_beside_which_nothing_can_be_written_says_so_once_and_goes_on(run, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "save", lambda *_: (_ for _ in ()).throw(UserError("read-only")))
    status, out, err = evaluated(capsys, run / "last.pt", "--attacks", "clean,pgd1", "--images", 20)
    assert status == 0 and len(err) == 1 and "last.pt.progress cannot be written" in err[0]
    assert any(" pgd1 " in line for line in out)


def test_a_file_in_the_way_of_the_progress_is_not_overwritten(run, tmp_path, capsys):
    file = tmp_path / "figures.json"
    torch.save({"mine": 1}, tmp_path / "figures.json.progress")
    for flags in ((), ("--resume",)):
        status, _, err = evaluated(capsys, run / "last.pt", "--images", 20, "--json", file, *flags)
        assert status == 2 and len(err) == 1 and "figures.json.progress is" in err[0]
    assert torch.load(tmp_path / "figures.json.progress") == {"mine": 1}


def test_auto_attack_that_is_not_installed_is_one_line(run, monkeypatch, capsys):
    def missing(name):
        raise evaluate.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(evaluate.metadata, "version", missing)
    argv = [run / "last.pt", "--attacks", "apgd"]
    check_mistake(lambda *argv: evaluated(capsys, *argv), argv, "pip install pyautoattack")


def check_protocol(module):
    """standard: 8/255 on all images. paper: AutoAttack at 0.031 on the first 1,000. The name says what was changed."""
    images = Images(torch.arange(1200), torch.arange(1200), ["a", "b"])
    attacks = ["clean", "pgd10", "cw", "apgd", "aa"]
    flags = {"protocol": "standard", "epsilon": None, "step_size": None, "images": None, "dataset": "cifar10"}
    planned = lambda **typed: module.protocol(SimpleNamespace(**{**flags, **typed}), attacks, images)
    name, plan = planned()
    assert name == "standard" and list(plan) == attacks
    assert all(epsilon == 8 / 255 and len(attacked.y) == 1200 for attacked, epsilon in plan.values())
    name, plan = planned(protocol="paper")
    assert name == "paper" and list(plan) == attacks and plan["aa"][1] == 0.031
    assert torch.equal(plan["aa"][0].x, torch.arange(1000)) and torch.equal(plan["aa"][0].y, torch.arange(1000))
    assert all(plan[other][1] == 8 / 255 and len(plan[other][0].y) == 1200 for other in attacks[:4])
    assert planned(epsilon=0.031, step_size=2 / 255, images=50)[0] == "standard except for --epsilon 0.031 --images 50"
    assert planned(epsilon=0.0)[1]["aa"][1] == 0.0


def test_the_protocols_are_what_they_say():
    check_protocol(evaluate)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("images.x[:1000], images.y[:1000]", "images.x[-1000:], images.y[-1000:]"),
        ("(first, 0.031)", "(first, 8 / 255)"),
        ("(first, 0.031)", "(images, 0.031)"),
        ('if name in ("aa", "aa-fast")', 'if name != "clean"'),
        ("typed not in (None, usual)", "False"),
        ("epsilon = 8 / 255 if args.epsilon is None else args.epsilon", "epsilon = args.epsilon or 8 / 255"),
    ],
)
def test_another_protocol_is_rejected(old, new):
    with pytest.raises(AssertionError):
        check_protocol(mutant_module(evaluate, (old, new)))


def check_together(module):
    """Per network and per equal epsilon and images, who stands against all; clean mistakes never stand."""
    cells = [
        ("target", "clean", None, [1, 1, 1, 0]),
        ("target", "pgd10", 0.1, [1, 1, 0, 1]),
        ("target", "cw", 0.1, [0, 1, 1, 1]),
        ("target", "pgd50", 0.1, [0, 0]),  # on fewer images
        ("target", "aa", 0.2, [0, 0, 0, 0]),  # in a larger ball
        ("guide", "pgd10", 0.1, [0, 0, 0, 0]),
    ]
    rows = [
        {"network": network, "attack": attack, "n": len(bits), **({"epsilon": epsilon} if epsilon else {})}
        for network, attack, epsilon, bits in cells
    ]
    flags = [torch.tensor(bits, dtype=torch.bool) for *_, bits in cells]
    (cell,) = module.together(rows, flags)
    assert (cell["network"], cell["attacks"], cell["epsilon"]) == ("target", ["clean", "pgd10", "cw"], 0.1)
    assert (cell["n"], cell["correct"], cell["accuracy"]) == (4, 1, 0.25)


def test_standing_against_all_attacks_is_counted_per_image():
    check_together(evaluate)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".all(0)", ".any(0)"),
        ('row.get("epsilon"), row["n"]', 'row.get("epsilon"), 0'),
        ('(row["network"], row.get("epsilon"), row["n"])', '("target", row.get("epsilon"), row["n"])'),
        ("groups.get((role, None, n), []) + members", "members"),
    ],
)
def test_another_count_of_who_stands_is_rejected(old, new):
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        check_together(mutant_module(evaluate, (old, new)))


class Changed(nn.Module):
    """model, with something done to its images and something to its logits."""

    def __init__(self, model, before, after):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def check_doubts(module, model, images):
    """A sound network raises no doubt, even if blind to some pixels; random outputs and vanishing gradients do."""
    x, y = evaluate.pixels(images.x), images.y
    same = lambda value: value
    half_blind = torch.cat([torch.zeros(3, 16, 32), torch.ones(3, 16, 32)], 1)
    model.train()
    assert (
        module.doubts(model, x, y) == [] and module.doubts(Changed(model, lambda x: x * half_blind, same), x, y) == []
    )
    assert model.training
    (random,) = module.doubts(Changed(model, same, lambda z: z + 0.1 * torch.randn_like(z)), x, y)
    assert "outputs are random" in random
    (vanished,) = module.doubts(Changed(model, same, lambda z: 1e4 * z), x, y)
    assert "gradients vanish: of 40 images," in vanished


def test_random_outputs_and_vanishing_gradients_are_warned_of(model, images):
    check_doubts(evaluate, model, images)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if vanished:", "if False:"),
        (".all(1).sum())", ".any(1).sum())"),
        ("> 1e-4", "> 2"),
        ("> 1e-4", "> -1"),
        ("logits, again = model(x), model(x)", "logits = again = model(x)"),
        ("    with eval_mode(model):\n        logits", "    if model.eval():\n        logits"),
    ],
)
def test_an_evaluation_without_doubts_is_rejected(old, new, model, images):
    with pytest.raises((AssertionError, ValueError)):
        check_doubts(mutant_module(evaluate, (old, new)), model, images)


def test_square_that_fools_what_gradients_did_not_is_warned_of(run, monkeypatch, capsys):
    row = {"attack": "aa", "n": 1000, "stages": [{"attack": "square", "attacked": 500, "correct": 497}]}
    (sentence,) = evaluate.masked(row)
    assert sentence.startswith("Square fooled 3 images")
    row["stages"][0]["correct"] = 498
    assert evaluate.masked(row) == [] and evaluate.masked({"attack": "pgd20", "n": 10}) == []
    interruptible(evaluate, monkeypatch)
    monkeypatch.setattr(evaluate, "masked", lambda row: ["doubtful"] if row["attack"] == "aa" else [])
    status, _, err = evaluated(capsys, run / "last.pt", *AA)
    assert status == 0 and err == ["warning: target: doubtful"]


def test_weights_with_a_normalisation_are_attacked_behind_it(run, tmp_path, capsys):
    content = checkpoints.load(run / "last.pt")
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1)
    torch.save({"state_dict": {**content["guide"], "mean": mean, "std": std}}, tmp_path / "normalised.pt")
    argv = (tmp_path / "normalised.pt", "--target", "cnn", "--dataset", "tiny", "--images", 40, "--attacks", "clean")
    file = tmp_path / "figures.json"
    assert evaluated(capsys, *argv, "--json", file)[0] == 0
    images = subset(load_images("tiny", "test"), 40, 0)
    model = build_model("cnn", 10)
    model.load_state_dict(content["guide"])
    hits = evaluate.correct(model.eval(), (evaluate.pixels(images.x) - mean) / std, images.y).sum()
    assert json.loads(file.read_text())["results"][0]["correct"] == int(hits)


def test_the_averaged_weights_are_attacked_where_they_are_asked_for(tmp_path, capsys):
    """With a decay of nearly 1 the average stays near the first weights, so its accuracy is another one."""
    argv = ["--dataset", "tiny", "--train-images", "400", "--epochs", "3", "--steps", "1", "--ema", "0.9999"]
    assert train_dynat.main([*argv, "--out", str(tmp_path / "a")]) == 0
    last = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    counted = {}
    for name, role in (("last", "target"), ("ema", "ema")):
        file = tmp_path / f"{name}.json"
        argv = [str(tmp_path / "a" / "last.pt"), "--weights", name, "--attacks", "clean", "--json", str(file)]
        assert evaluate.main(argv) == 0
        counted[name] = json.loads(file.read_text())["results"][0]["accuracy"]
        model = build_model("cnn", 10)
        model.load_state_dict(last[role])
        assert counted[name] == pytest.approx(counted_accuracy(model, load_images("tiny", "test")))
    assert counted["last"] != counted["ema"]
    assert (
        train_dynat.main(["--dataset", "tiny", "--train-images", "9", "--epochs", "1", "--out", str(tmp_path / "b")])
        == 0
    )
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "b" / "last.pt"), "--weights", "ema"]) == 2
    assert "--ema" in capsys.readouterr().err


def timed(run, folder, *flags):
    file = folder / "timed.json"
    argv = [run / "last.pt", "--network", "guide", "--images", 40, "--batch-size", 16, "--repeats", 2, "--json", file]
    status = evaluation.main([str(argument) for argument in (*argv, *flags)])
    return status, json.loads(file.read_text()) if file.exists() else None


def test_the_benchmark_counts_what_the_evaluation_counts(run, images, tmp_path, model):
    status, report = timed(run, tmp_path, "--attacks", "pgd2,cw")
    assert status == 0 and report["images"] == 40 and report["device"] and report["torch"]
    assert [row["attack"] for row in report["results"]] == ["pgd2", "cw"]
    for row in report["results"]:
        stands = evaluate.robust(model, images, row["attack"], **BUDGET, batch_size=40, seed=0)
        assert row["plain"]["correct"] == row["evaluate"]["correct"] == int(stands.sum()) and row["differing"] == 0
        assert all(len(row[way]["repeats"]) == 2 and min(row[way]["repeats"]) > 0 for way in ("plain", "evaluate"))


def test_a_benchmark_of_two_different_attacks_is_rejected(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "refilled", lambda model, images, *_: torch.zeros(len(images.y), dtype=torch.bool))
    assert timed(run, tmp_path, "--attacks", "pgd1") == (2, None)
    assert "images are judged differently" in capsys.readouterr().err
