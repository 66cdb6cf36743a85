"""Agreement with the authors' releases, in float64, through the project's own steps and attacks.

The values were recorded from the releases' code on tiny inputs; another folder of them is read from DYNAT_GOLDEN. The
methods that nobody has released are tied to those they are made of.
"""

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close, assert_state, golden_cases, golden_files, joint_sgd, step_arguments, tiny_net

import attacks
import robustness
from attacks import counting_pgd, eval_mode, linf_pgd, weight_perturbation
from losses import gairat_weights, kl_divergence, mail_weights, probability_gap, trades_loss
from train_dynat import METHODS

pytestmark = pytest.mark.usefixtures("float64")
each_file = pytest.mark.parametrize("file", golden_files(), ids=lambda file: file.stem)


def budget(hp):
    return {"epsilon": hp["epsilon"], "step_size": hp["step_size"], "steps": int(hp["perturb_steps"])}


@each_file
def test_every_golden_case_is_tested(file):
    assert golden_cases(file).keys() <= {*UPDATES, *TRAINING_ATTACKS, *EVALUATION_ATTACKS}


# Updates: per case the method, the epoch (1-based) at which its published schedule does what the release did, and
# settings that differ from the published ones.
UPDATES = {
    "dynat_inner": ("dynat-inner", 1, {}),
    "dynat_kl_inner": ("dynat", 1, {}),
    "dynat_awp": ("dynat-awp", 10, {}),
    "dynat_awp_kl0": ("dynat-awp", 10, {}),
    "dynat_awp_warmup": ("dynat-awp", 9, {}),
    "dynat_inner_awp": ("dynat-inner-awp", 10, {}),
    "pgd_at_rice": ("pgd-at", 1, {}),
    "trades": ("trades", 1, {}),
    "mart": ("mart", 1, {}),
    "fat_tau0": ("fat", 50, {}),
    "fat_tau1_osc": ("fat", 51, {}),
    "fat_tau3": ("fat", 1, {"tau_milestones": [(1, 3)]}),
    "sat_gap00": ("sat", 30, {}),
    "sat_gap20": ("sat", 50, {}),
    "sat_gap40": ("sat", 70, {}),
    "sat_at": ("sat", 70, {"difficulty": 1.0}),
    "gairat": ("gairat", 60, {}),
    "gairat_osc": ("gairat", 60, {}),
    "gairat_cap": ("gairat", 59, {}),  # Lambda = infinity, the release's way to weights of 1
    "mail_at": ("mail", 77, {}),
    "mail_at_burnin": ("mail", 76, {}),
    "at_awp": ("at-awp", 1, {}),
    "at_awp_norm": ("at-awp", 1, {}),
    "trades_awp": ("trades-awp", 10, {}),
    "trades_awp_255": ("trades-awp", 10, {}),
    "lbgat": ("lbgat", 1, {}),
    "lbgat_beta0": ("lbgat", 1, {}),
}
# Elsewhere the release forwards the guide 2 to 12 times an update, which only its BatchNorm buffers show.
ONE_GUIDE_FORWARD = ("dynat_kl_inner", "lbgat", "lbgat_beta0")


def start_of(name, case, iteration=""):
    """Where the release begins: x + scale * N(0, 1) or x + U not clamped, or x + U clamped to [0, 1]."""
    x, noise = case[iteration + "x"], case[iteration + "noise"]
    if "noise_scale" in case["hp"]:
        return x + case["hp"]["noise_scale"] * noise
    return x + noise if name.startswith("mail") else (x + noise).clamp(0, 1)


def networks_of(case):
    """The tiny nets by role; the target normalises its images where the release does."""
    networks = {role: tiny_net(case[f"{role}_before"]) for role in ("target", "guide") if f"{role}_before" in case}
    mean, std = case.get("norm_mean", case.get("mean")), case.get("norm_std", case.get("std"))
    if mean is not None:
        normalise = lambda _, images: ((images[0] - mean.view(3, 1, 1)) / std.view(3, 1, 1),)
        networks["target"].register_forward_pre_hook(normalise)
    return networks


@each_file
@pytest.mark.parametrize("name", UPDATES)
def test_the_update_agrees_with_the_release(file, name):
    """In x_adv, loss, weights and BatchNorm buffers; where two updates were recorded, in both."""
    case, (method, epoch, special) = golden_cases(file)[name], UPDATES[name]
    networks, hp = networks_of(case), case["hp"]
    optimizer = joint_sgd(hp, *networks.values())
    recorded = {"beta": hp.get("lam"), "kl_weight": hp.get("kl_weight", hp.get("beta")), **budget(hp)}
    arguments = step_arguments(method, epoch=epoch, **recorded, **special)
    step = METHODS[method]["step"]
    for iteration in [prefix for prefix in ("", "it2_") if prefix + "x" in case]:
        x, y, start = case[iteration + "x"], case[iteration + "y"], start_of(name, case, iteration)
        x_adv, metrics = step(**networks, optimizer=optimizer, x=x, y=y, start=start, **arguments)
        assert_close(x_adv, case[iteration + "x_adv"], 1e-12, "x_adv")
        assert_close(metrics["loss"], case[iteration + "loss"], 1e-10, "loss")
        for role, network in networks.items():
            buffers = role == "target" or name in ONE_GUIDE_FORWARD
            assert_state(network, case[f"{iteration}{role}_after_step"], 1e-10, role, buffers)


@each_file
@pytest.mark.parametrize("name", [name for name in UPDATES if "awp" in name and "warmup" not in name])
def test_the_weight_perturbation_agrees_with_the_release(file, name):
    case = golden_cases(file)[name]
    target, before, gamma = networks_of(case)["target"], case["target_before"], case["hp"]["awp_gamma"]
    if name.startswith("at_awp"):  # whose eleven forwards in train mode do not touch the perturbation
        objective = lambda: F.cross_entropy(target(case["x_adv"]), case["y"])
    else:
        objective = lambda: trades_loss(target(case["x"]), target(case["x_adv"]), case["y"], case["hp"]["awp_beta"])
    assert_close(objective(), -case["awp_proxy_loss"], 1e-10, "objective")
    target.load_state_dict(before)
    expected = {key: value + gamma * case["awp_diff"].get(key, torch.zeros(())) for key, value in before.items()}
    with weight_perturbation(target, objective, gamma):
        assert_state(target, expected, 1e-12, "perturbed target")
    assert_state(target, before, 1e-12, "target")


@each_file
@pytest.mark.parametrize("name", ["gairat", "gairat_osc", "gairat_cap"])
def test_kappa_and_its_weights_agree_with_the_release(file, name):
    case = golden_cases(file)[name]
    target, hp = tiny_net(case["target_before"]).eval(), case["hp"]
    _, kappa = counting_pgd(target, case["x"], start_of(name, case), case["y"], **budget(hp))
    assert torch.equal(kappa, case["kappa"].long())
    assert_close(gairat_weights(kappa, int(hp["perturb_steps"]), hp["Lambda"]), case["weight"], 1e-10, "weight")


@each_file
def test_margin_and_its_weights_agree_with_the_release(file):
    case = golden_cases(file)["mail_at"]
    assert_close(probability_gap(case["logits_adv"], case["y"]), case["margin"], 1e-10, "margin")
    assert_close(mail_weights(case["logits_adv"], case["y"]), case["weight"], 1e-10, "weight")


# The hybrids, which nobody has released: tied to the methods that they are made of.


class Decided(torch.nn.Module):
    """A guide whose decisions are given."""

    def __init__(self, labels):
        super().__init__()
        self.labels = labels
        self.scale = torch.nn.Parameter(torch.tensor(5.0))

    def forward(self, x):
        return self.scale * F.one_hot(self.labels, 10)


HYBRIDS = dict.fromkeys(("dynat-gairat", "dynat-inner-gairat"), ("gairat", 71))  # golden case; epoch with weights
HYBRIDS |= dict.fromkeys(("dynat-mail", "dynat-inner-mail", "mail-mse"), ("mail_at", 77))


def hybrid_update(case, method, labels, **settings):
    """Target and guide after one update of a hybrid whose guide decides for `labels`; x_adv and the metrics."""
    name, epoch = HYBRIDS[method]
    target, guide = tiny_net(case["target_before"]), Decided(labels)
    optimizer, start = joint_sgd(case["hp"], target, guide), start_of(name, case)
    arguments = step_arguments(method, epoch=epoch, **budget(case["hp"]), **settings)
    step = METHODS[method]["step"]
    return target, guide, *step(target, guide, optimizer, case["x"], case["y"], start, **arguments)


def wrong_labels(case):
    """A guide's decisions, half of them wrong."""
    return torch.where(torch.arange(8) % 2 == 0, (case["y"] + 3) % 10, case["y"])


@each_file
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("method", [method for method in HYBRIDS if method != "mail-mse"])
def test_a_hybrid_whose_guide_is_right_is_its_host(file, method, static):
    """So is one with static labels, whatever its guide decides."""
    case = golden_cases(file)[HYBRIDS[method][0]]
    labels = wrong_labels(case) if static else case["y"]
    target, _, x_adv, metrics = hybrid_update(case, method, labels, static_labels=static, label_smoothing=0.0)
    assert_close(x_adv, case["x_adv"], 1e-12, "x_adv")
    assert_close(metrics["loss_target"], case["loss"], 1e-10, "loss_target")
    assert_state(target, case["target_after_step"], 1e-10, "target")


@each_file
@pytest.mark.parametrize("method", HYBRIDS)
def test_a_hybrid_uses_dynamic_labels_where_it_says(file, method):
    """With a guide that is often wrong, a hybrid's attack, weights and loss use the labels that its file says."""
    case = golden_cases(file)[HYBRIDS[method][0]]
    y, labels, hp = case["y"], wrong_labels(case), case["hp"]
    target, guide, x_adv, metrics = hybrid_update(case, method, labels, beta=0.5)

    host, host_guide = tiny_net(case["target_before"]), Decided(labels)
    attacked = labels if "inner" in method else y
    with eval_mode(host):
        expected, kappa = counting_pgd(host, case["x"], start_of(HYBRIDS[method][0], case), attacked, **budget(hp))
    logits, guide_logits = host(expected), host_guide(case["x"])
    p = F.softmax(logits, 1)
    losses, weights, beta = -p[range(8), labels].log(), mail_weights(logits, labels), 0.5
    if method == "mail-mse":
        losses, weights, beta = (logits - guide_logits).square().sum(1) / 10, mail_weights(logits, y), 1.0
    elif "gairat" in method:
        losses = 0.8 * losses - 0.2 * p.log().mean(1)
        weights = gairat_weights(kappa, int(hp["perturb_steps"]))
    loss = (weights * losses).mean()
    optimizer = joint_sgd(hp, host, host_guide)
    (F.cross_entropy(guide_logits, y) + beta * loss).backward()
    optimizer.step()
    assert_close(x_adv, expected, 1e-12, "x_adv")
    assert_close(metrics["loss_target"], loss, 1e-10, "loss_target")
    assert_state(target, host.state_dict(), 1e-10, "target")
    assert_state(guide, host_guide.state_dict(), 1e-10, "guide")


TRAINING_ATTACKS = ["trades_kl_attack", "pgd_ce_attack", "eval_pgd_trades"]


@each_file
@pytest.mark.parametrize("name", TRAINING_ATTACKS)
def test_the_attack_agrees_with_the_release(file, name):
    case = golden_cases(file)[name]
    target, x, y = tiny_net(case["target_before"]).eval(), case["x"], case["y"]
    clean_logits = target(x).detach()
    objective = lambda logits: F.cross_entropy(logits, y, reduction="sum")
    if name == "trades_kl_attack":
        objective = lambda logits: kl_divergence(clean_logits, logits).sum()
    x_adv = linf_pgd(target, x, case["x_init"], objective, **budget(case["hp"]))
    assert_close(x_adv, case["x_adv"], 1e-12, "x_adv")


EVALUATION_ATTACKS = {"eval_pgd10": attacks.pgd, "eval_pgd20": attacks.pgd, "eval_cw20": attacks.cw}


@each_file
@pytest.mark.parametrize("name", EVALUATION_ATTACKS)
def test_the_evaluation_attack_agrees_with_the_release(file, name):
    case = golden_cases(file)[name]
    target, x, y = tiny_net(case["target_before"]).eval(), case["x"], case["y"]
    x_adv = EVALUATION_ATTACKS[name](target, x, y, case["x_init"], **budget(case["hp"]))
    assert torch.equal(robustness.is_correct(target, x, y), case["correct_clean"])
    assert_close(x_adv, case["x_adv"], 1e-12, "x_adv")
    assert torch.equal(robustness.is_correct(target, x_adv, y), case["correct_adv"])
