"""How many images stay correct under the attacks of other libraries, beside ours: the tables of docs/peers.md.

    python benchmarks/peers.py WEIGHTS DATA OURS.npz fgsm pgd ...    the groups of `attacks`

OURS.npz is the matrix that evaluate.py kept; its images are attacked, with epsilon 8/255. An image is correct if what
the attack returned for it is classified as its label. "Other" are images with another verdict than under our attack,
"outside" those that left [0, 1] or the ball. Generators are seeded with 0. docs/peers.md names the packages to install.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import adv_lib.attacks
import foolbox
import numpy as np
import torch
import torchattacks
from art.attacks import evasion
from art.estimators.classification import PyTorchClassifier
from captum import robust
from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method
from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent
from rai_toolbox.optim import LinfProjectedOptim
from rai_toolbox.perturbations import AdditivePerturbation, gradient_ascent
from rai_toolbox.perturbations.init import uniform_like_linf_n_ball_
from secmlt.adv.evasion.fgsm import FGSM
from secmlt.adv.evasion.pgd import PGD
from secmlt.models.pytorch.base_pytorch_nn import BasePyTorchClassifier
from torch.nn.functional import cross_entropy

from data import load_images, to_float
from models import build_model

EPSILON, STEP, STEPS, BATCH = 8 / 255, 2 / 255, 20, 250
OURS = {"fgsm": "fgsm", "pgd": "pgd20", "margin": "cw", "apgd": "apgd"}  # group: attack of evaluate.py


def attacks(model):
    """(group, name, attack) for each row of the tables; an attack takes images and labels and returns images."""
    yield "fgsm", "torchattacks", torchattacks.FGSM(model, EPSILON)
    yield "pgd", "torchattacks", torchattacks.PGD(model, EPSILON, STEP, STEPS)
    yield "apgd", "torchattacks", torchattacks.APGD(model, eps=EPSILON, steps=100)
    yield "defaults", "torchattacks PGD", torchattacks.PGD(model)
    yield "defaults", "torchattacks APGD", torchattacks.APGD(model)

    network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    run = lambda attack: lambda x, y: attack(network, x, y, epsilons=EPSILON)[1]
    yield "fgsm", "foolbox", run(foolbox.attacks.LinfFastGradientAttack())
    yield "pgd", "foolbox", run(foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS))
    yield "defaults", "foolbox LinfPGD", run(foolbox.attacks.LinfPGD())

    classifier = PyTorchClassifier(model, torch.nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1))
    run = lambda attack: lambda x, y: torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
    budget = {"eps": EPSILON, "eps_step": STEP, "batch_size": BATCH, "verbose": False}
    art_pgd = evasion.ProjectedGradientDescent(classifier, max_iter=STEPS, num_random_init=1, **budget)
    art_apgd = evasion.AutoProjectedGradientDescent(classifier, nb_random_init=1, loss_type="cross_entropy", **budget)
    yield "fgsm", "ART", run(evasion.FastGradientMethod(classifier, eps=EPSILON, batch_size=BATCH))
    yield "pgd", "ART", run(art_pgd)
    yield "apgd", "ART", run(art_apgd)
    yield "defaults", "ART PGD", run(evasion.ProjectedGradientDescent(classifier, eps=EPSILON, verbose=False))
    yield "traps", "ART PGD without y", lambda x, y: torch.from_numpy(art_pgd.generate(x.numpy()))

    box = {"norm": np.inf, "clip_min": 0, "clip_max": 1}
    clever_pgd = partial(projected_gradient_descent, model, eps=EPSILON, eps_iter=STEP, nb_iter=STEPS)
    yield "fgsm", "cleverhans", lambda x, y: fast_gradient_method(model, x, EPSILON, y=y, **box)
    yield "pgd", "cleverhans", lambda x, y: clever_pgd(x, y=y, **box)
    yield "traps", "cleverhans PGD without y", lambda x, y: clever_pgd(x, **box)
    yield "traps", "cleverhans PGD without clip_min and clip_max", lambda x, y: clever_pgd(x, y=y, norm=np.inf)

    each = partial(cross_entropy, reduction="none")
    run = lambda loss: lambda x, y: robust.PGD(model, loss, 0, 1).perturb(x, EPSILON, STEP, STEPS, y, random_start=True)
    yield "fgsm", "captum", lambda x, y: robust.FGSM(model, each, 0, 1).perturb(x, EPSILON, y)
    yield "pgd", "captum", run(each)
    yield "traps", "captum PGD on logits without a loss", run(None)

    advlib_pgd = partial(adv_lib.attacks.pgd_linf, model, ε=EPSILON, absolute_step_size=STEP)
    yield "pgd", "adv-lib", partial(advlib_pgd, steps=STEPS + 1)
    yield "margin", "adv-lib", partial(advlib_pgd, steps=STEPS + 1, loss_function="dl")
    yield "apgd", "adv-lib", partial(adv_lib.attacks.apgd, model, eps=EPSILON, norm=np.inf, loss_function="ce")
    yield "defaults", "adv-lib pgd_linf", partial(adv_lib.attacks.pgd_linf, model, ε=EPSILON)

    run = lambda attack: lambda x, y: attack._run(BasePyTorchClassifier(model), x, y)[0]
    yield "fgsm", "secml-torch, foolbox", run(FGSM("linf", EPSILON))
    yield "fgsm", "secml-torch, adv-lib", run(FGSM("linf", EPSILON, backend="advlib"))
    yield "pgd", "secml-torch, native", run(PGD("linf", EPSILON, STEPS, STEP, random_start=True, backend="native"))

    clamped = lambda x: model(x.clamp(0, 1))  # rai-toolbox does not clamp
    solver = partial(gradient_ascent, optimizer=LinfProjectedOptim, epsilon=EPSILON)
    start = partial(AdditivePerturbation, init_fn=uniform_like_linf_n_ball_, epsilon=EPSILON)
    one_step, many_steps = {"lr": EPSILON, "steps": 1}, {"lr": STEP, "steps": STEPS, "perturbation_model": start}
    run = lambda network, steps: lambda x, y: solver(model=network, data=x, target=y, **steps)[0]
    yield "fgsm", "rai-toolbox", lambda x, y: run(clamped, one_step)(x, y).clamp(0, 1)
    yield "pgd", "rai-toolbox", lambda x, y: run(clamped, many_steps)(x, y).clamp(0, 1)
    yield "traps", "rai-toolbox PGD without a clamp", run(model, many_steps)


def main(weights, data_dir, ours, *groups):
    kept = np.load(ours)
    images = load_images("folder", "test", data_dir).select(torch.from_numpy(kept["indices"]))
    x, y = to_float(images.x), images.y
    model = build_model("cnn-2", 10).eval().requires_grad_(False)
    model.load_state_dict(torch.load(weights))
    print("| group | attack | correct | other | outside |\n|---|---|---|---|---|")
    for group, name, attack in attacks(model):
        if group in groups:
            torch.manual_seed(0)
            np.random.seed(0)
            x_adv = torch.cat([attack(*pair).detach() for pair in zip(x.split(BATCH), y.split(BATCH), strict=True)])
            is_correct = (model(x_adv).argmax(1) == y).numpy()
            other = sum(is_correct != kept[f"target {OURS.get(group, 'pgd20')}"])
            outside = ((x_adv < 0) | (x_adv > 1) | ((x_adv - x).abs() > EPSILON + 1e-6)).flatten(1).any(1).sum()
            print(f"| {group} | {name} | {is_correct.sum()} of {len(y)} | {other} | {outside} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
