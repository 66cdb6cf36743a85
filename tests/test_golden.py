"""Agreement with the authors' releases, in float64, through the project's own steps and attacks.

The values were recorded from the releases' code on tiny inputs; another folder of them is read from DYNAT_GOLDEN.
"""

import pytest
import torch
import torch.nn.functional as F
from cases import GOLDEN, assert_close, assert_state, golden_case, golden_files, joint_sgd, mutant, tiny_net

import evaluate
from attacks import eval_mode, linf_pgd
from losses import kl_divergence
from train_dynat import dynat_step

pytestmark = pytest.mark.usefixtures("float64")
each_file = pytest.mark.parametrize("file", golden_files(), ids=lambda file: file.stem)


def budget(hp):
    return {"epsilon": hp["epsilon"], "step_size": hp["step_size"], "steps": int(hp["perturb_steps"])}


def test_golden_values_are_there():
    assert golden_files(), f"no release_*.pt in {GOLDEN}"


def check_dynat(file, name, step):
    """Two updates of a DYNAT step agree with the release: x_adv, loss, weights, BatchNorm buffers."""
    case = golden_case(file, name)
    hp = case["hp"]
    target, guide = tiny_net(case["target_before"]), tiny_net(case["guide_before"])
    optimizer = joint_sgd(hp, target, guide)
    for iteration in ("", "it2_"):
        x, y = case[iteration + "x"], case[iteration + "y"]
        start = x + hp["noise_scale"] * case[iteration + "noise"]
        x_adv, figures = step(
            target, guide, optimizer, x, y, start, inner=name == "dynat_inner", beta=hp["lam"], **budget(hp)
        )
        assert_close(x_adv, case[iteration + "x_adv"], 1e-12, "x_adv")
        assert_close(figures["loss"], case[iteration + "loss"], 1e-10, "loss")
        assert_state(target, case[iteration + "target_after_step"], 1e-10, "target")
        # dynat_inner's release forwards the guide eleven times an update, which only its BatchNorm buffers show.
        once = name == "dynat_kl_inner"
        assert_state(guide, case[iteration + "guide_after_step"], 1e-10, "guide", buffers=once)


@each_file
@pytest.mark.parametrize("name", ["dynat_inner", "dynat_kl_inner"])
def test_two_dynat_updates_agree_with_the_release(file, name):
    check_dynat(file, name, dynat_step)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("target_loss(adv_logits, labels)", "target_loss(adv_logits, y)"),
        ("guide_loss(guide_logits, y)", "guide_loss(guide_logits, labels)"),
        ("guide_logits = guide(x)", "guide_logits = guide.eval()(x)"),
        ("with eval_mode(target):", "if True:"),
        ("            target(x)  # no loss term", "            pass  # no loss term"),
        ("adv_logits = target(x_adv)", "adv_logits = target(x)"),
        ("beta * loss_target", "2 * beta * loss_target"),
        ("F.cross_entropy(logits, labels, reduction=", "F.cross_entropy(logits, y, reduction="),
    ],
)
def test_a_broken_inner_step_is_rejected(old, new):
    with pytest.raises(AssertionError, match="differs"):
        check_dynat(golden_files()[0], "dynat_inner", mutant(dynat_step, (old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kl_divergence(clean_logits, logits)", "kl_divergence(logits, clean_logits)"),
        ("clean_logits = target(x)", "clean_logits = target(start)"),
    ],
)
def test_a_broken_kl_step_is_rejected(old, new):
    with pytest.raises(AssertionError, match="differs"):
        check_dynat(golden_files()[0], "dynat_kl_inner", mutant(dynat_step, (old, new)))


def check_training_attack(file, name, attack):
    case = golden_case(file, name)
    target, x, y = tiny_net(case["target_before"]), case["x"], case["y"]
    with eval_mode(target):
        if name == "trades_kl_attack":
            clean_logits = target(x).detach()
            objective = lambda logits: kl_divergence(clean_logits, logits).sum()
        else:
            objective = lambda logits: F.cross_entropy(logits, y, reduction="sum")
        x_adv = attack(target, x, case["x_init"], objective, **budget(case["hp"]))
    assert_close(x_adv, case["x_adv"], 1e-12, "x_adv")


TRAINING_ATTACKS = ["trades_kl_attack", "pgd_ce_attack", "eval_pgd_trades"]
BROKEN_ATTACKS = [
    (".sign()", ".sign().neg()"),
    ("torch.clamp(x_adv.detach() + step, low, high)", "x_adv.detach() + step"),
    ("range(steps)", "range(steps - 1)"),
    ("low, high = x - epsilon, x + epsilon", "low, high = start - epsilon, start + epsilon"),
]


@each_file
@pytest.mark.parametrize("name", TRAINING_ATTACKS)
def test_the_attack_agrees_with_the_release(file, name):
    check_training_attack(file, name, linf_pgd)


@pytest.mark.parametrize(("old", "new"), BROKEN_ATTACKS)
@pytest.mark.parametrize("name", TRAINING_ATTACKS)
def test_a_broken_attack_is_rejected(name, old, new):
    with pytest.raises(AssertionError, match="differs"):
        check_training_attack(golden_files()[0], name, mutant(linf_pgd, (old, new)))


def check_evaluation_attack(file, name, attack):
    case = golden_case(file, name)
    target, x, y = tiny_net(case["target_before"]).eval(), case["x"], case["y"]
    x_adv = attack(target, x, y, case["x_init"], **budget(case["hp"]))
    assert torch.equal(evaluate.correct(target, x, y), case["correct_clean"])
    assert_close(x_adv, case["x_adv"], 1e-12, "x_adv")
    assert torch.equal(evaluate.correct(target, x_adv, y), case["correct_adv"])


EVALUATION_ATTACKS = {"eval_pgd10": evaluate.pgd, "eval_pgd20": evaluate.pgd, "eval_cw20": evaluate.cw}


@each_file
@pytest.mark.parametrize("name", EVALUATION_ATTACKS)
def test_the_evaluation_attack_agrees_with_the_release(file, name):
    check_evaluation_attack(file, name, EVALUATION_ATTACKS[name])


@pytest.mark.parametrize("name", EVALUATION_ATTACKS)
def test_an_evaluation_that_moves_fooled_images_is_rejected(name):
    broken = mutant(EVALUATION_ATTACKS[name], ("active=lambda z: z.argmax(1) == y", "active=None"))
    with pytest.raises(AssertionError, match="differs"):
        check_evaluation_attack(golden_files()[0], name, broken)


def test_a_cw_that_is_pgd_is_rejected():
    with pytest.raises(AssertionError, match="differs"):
        check_evaluation_attack(golden_files()[0], "eval_cw20", evaluate.pgd)
