"""How many images stay correct under the attacks of other libraries, beside ours: the tables of docs/peers.md.

`PYTHONPATH=. python benchmarks/peers.py WEIGHTS DATA OURS.npz` attacks the images of OURS.npz, the matrix that
evaluate.py kept, by the rows below whose attack of ours it has.
"""

import sys
from functools import partial

import foolbox
import numpy as np
import torch
import torchattacks
from adv_lib.attacks import apgd, pgd_linf
from art.attacks import evasion
from art.estimators.classification import PyTorchClassifier
from captum import robust
from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method
from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent
from rai_toolbox import optim, perturbations
from secmlt.adv.evasion import fgsm, pgd
from secmlt.models.pytorch.base_pytorch_nn import BasePyTorchClassifier

from data import load_images, to_float
from models import build_model

EPSILON, STEP, STEPS = 8 / 255, 2 / 255, 20


def row(ours, name, attack, *args, **settings):
    """Prints how many images are correct, have another verdict than under our attack, left [0, 1] or the ball."""
    if f"target {ours}" in kept:
        torch.manual_seed(0)
        np.random.seed(0)
        x_adv = attack(*args, **settings)
        x_adv = torch.as_tensor(x_adv[0] if isinstance(x_adv, tuple) else x_adv).detach()
        correct = (model(x_adv).argmax(1) == y).numpy()
        other = (correct != kept[f"target {ours}"]).sum()
        outside = ((x_adv < 0) | (x_adv > 1) | ((x_adv - x).abs() > EPSILON + 1e-6)).flatten(1).any(1).sum()
        print(f"| {ours} | {name} | {correct.sum()} of {len(y)} | {other} | {outside} |", flush=True)


kept = np.load(sys.argv[3])
images = load_images("folder", "test", sys.argv[2]).select(torch.from_numpy(kept["indices"]))
x, y = to_float(images.x, torch.contiguous_format), images.y  # torchattacks' FAB views NCHW only
model = build_model("cnn-2", 10).eval().requires_grad_(False)
model.load_state_dict(torch.load(sys.argv[1]))

row("fgsm", "torchattacks", torchattacks.FGSM(model, EPSILON), x, y)
row("pgd20", "torchattacks", torchattacks.PGD(model, EPSILON, STEP, STEPS), x, y)
row("pgd20", "torchattacks, defaults", torchattacks.PGD(model), x, y)
row("pgd20", "torchattacks APGD, defaults", torchattacks.APGD(model), x, y)
row("apgd", "torchattacks", torchattacks.APGD(model, eps=EPSILON, steps=100), x, y)
row("aa", "torchattacks", torchattacks.AutoAttack(model, eps=EPSILON, seed=0), x, y)
row("fgsm", "cleverhans", fast_gradient_method, model, x, EPSILON, np.inf, 0, 1, y)
row("pgd20", "cleverhans", projected_gradient_descent, model, x, EPSILON, STEP, STEPS, np.inf, 0, 1, y)
row("pgd20", "cleverhans without y", projected_gradient_descent, model, x, EPSILON, STEP, STEPS, np.inf, 0, 1)
row("pgd20", "cleverhans without a box", projected_gradient_descent, model, x, EPSILON, STEP, STEPS, np.inf, y=y)
row("pgd20", "adv-lib", pgd_linf, model, x, y, EPSILON, steps=STEPS + 1, absolute_step_size=STEP)
row("pgd20", "adv-lib, defaults", pgd_linf, model, x, y, EPSILON)
row("cw", "adv-lib", pgd_linf, model, x, y, EPSILON, steps=STEPS + 1, absolute_step_size=STEP, loss_function="dl")
row("apgd", "adv-lib", apgd, model, x, y, EPSILON, np.inf, loss_function="ce")
each = torch.nn.CrossEntropyLoss(reduction="none")
row("fgsm", "captum", robust.FGSM(model, each, 0, 1).perturb, x, EPSILON, y)
row("pgd20", "captum", robust.PGD(model, each, 0, 1).perturb, x, EPSILON, STEP, STEPS, y, random_start=True)
row("pgd20", "captum, no loss", robust.PGD(model, None, 0, 1).perturb, x, EPSILON, STEP, STEPS, y, random_start=True)

network, wrapped = foolbox.PyTorchModel(model, (0, 1), device="cpu"), BasePyTorchClassifier(model)
secml_pgd = pgd.PGD("linf", EPSILON, STEPS, STEP, random_start=True, backend="native")
row("fgsm", "foolbox", foolbox.attacks.LinfFastGradientAttack(), network, x, y, epsilons=EPSILON)
row("pgd20", "foolbox", foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS), network, x, y, epsilons=EPSILON)
row("pgd20", "foolbox, defaults", foolbox.attacks.LinfPGD(), network, x, y, epsilons=EPSILON)
row("fgsm", "secml-torch, foolbox", fgsm.FGSM("linf", EPSILON)._run, wrapped, x, y)
row("fgsm", "secml-torch, adv-lib", fgsm.FGSM("linf", EPSILON, backend="advlib")._run, wrapped, x, y)
row("pgd20", "secml-torch", secml_pgd._run, wrapped, x, y)

classifier = PyTorchClassifier(model, torch.nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1))
budget = {"eps": EPSILON, "batch_size": 250, "verbose": False}
art_pgd = evasion.ProjectedGradientDescent(classifier, eps_step=STEP, max_iter=STEPS, num_random_init=1, **budget)
art_apgd = {"eps_step": 2 * EPSILON, "nb_random_init": 1, "loss_type": "cross_entropy", **budget}
row("fgsm", "ART", evasion.FastGradientMethod(classifier, eps=EPSILON).generate, x.numpy(), y.numpy())
row("pgd20", "ART", art_pgd.generate, x.numpy(), y.numpy())
row("pgd20", "ART, defaults", evasion.ProjectedGradientDescent(classifier, **budget).generate, x.numpy(), y.numpy())
row("pgd20", "ART without y", art_pgd.generate, x.numpy())
row("apgd", "ART", evasion.AutoProjectedGradientDescent(classifier, **art_apgd).generate, x.numpy(), y.numpy())
row("aa", "ART", evasion.AutoAttack(classifier, eps=EPSILON).generate, x.numpy(), y.numpy())

clamped = lambda x: model(x.clamp(0, 1))  # rai-toolbox does not clamp
rai = partial(perturbations.gradient_ascent, optimizer=optim.LinfProjectedOptim, data=x, target=y, epsilon=EPSILON)
uniform = perturbations.init.uniform_like_linf_n_ball_
start = partial(perturbations.AdditivePerturbation, init_fn=uniform, epsilon=EPSILON)
rai_pgd = partial(rai, lr=STEP, steps=STEPS, perturbation_model=start)
row("fgsm", "rai-toolbox", lambda: rai(model=clamped, lr=EPSILON, steps=1)[0].clamp(0, 1))
row("pgd20", "rai-toolbox", lambda: rai_pgd(model=clamped)[0].clamp(0, 1))
row("pgd20", "rai-toolbox without a clamp", rai_pgd, model=model)
