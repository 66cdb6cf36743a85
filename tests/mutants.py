"""Mutants: the product with one piece of its source replaced. Each must make a test fail, or that test tests nothing.

    pytest -m slow tests/mutants.py

A row is the mutated function, the piece that is replaced, what replaces it, and the test that must notice. All other
tests look at behaviour alone. So whoever renames a variable or rewords a comment changes rows of this file at most: it
says which piece of source it no longer finds.
"""

import inspect
import pkgutil
import sys
import textwrap
from contextlib import contextmanager
from functools import partial

import pytest
import test_attacks
import test_evaluate
import test_golden
import test_losses
import test_methods
import test_training
from cases import golden_files

# Fixtures that tests of other files ask for.
from test_evaluate import images, model, run  # noqa: F401
from test_training import few_images, whole  # noqa: F401

pytestmark = pytest.mark.slow


@contextmanager
def mutant(name, old, new):
    """Inside the `with`, the function called `name` runs with `new` in the place of `old`, for all who call it."""
    function = inspect.unwrap(pkgutil.resolve_name(name))
    source = textwrap.dedent(inspect.getsource(function))  # a method is indented
    file = inspect.getsourcefile(function)
    hint = f"in {function.__name__}() of {file}: was it renamed or reworded? Then change this row."
    if source.count(old) != 1:
        pytest.fail(f"{old!r} stands {source.count(old)} times, not once, {hint}", pytrace=False)
    namespace = dict(vars(sys.modules[function.__module__]))
    exec(source.replace(old, new), namespace)
    broken = inspect.unwrap(namespace[function.__name__])
    with pytest.MonkeyPatch.context() as patch:
        for part in ("__code__", "__defaults__", "__kwdefaults__"):
            patch.setattr(function, part, getattr(broken, part))
        try:
            yield
        except NameError as error:
            pytest.fail(f"{new!r} finds no such name, {error}, {hint}", pytrace=False)


# Noticed by a recorded value of a release, in a tensor that "differs". The last cell is the golden case, or the hybrid.
GOLDEN = [
    ("train_dynat.dynat_step", "target_loss(adv_logits, labels)", "target_loss(adv_logits, y)", "dynat_inner"),
    ("train_dynat.dynat_step", "guide_loss(guide_logits, y)", "guide_loss(guide_logits, labels)", "dynat_inner"),
    ("train_dynat.dynat_step", "guide_logits = guide(x)", "guide_logits = guide.eval()(x)", "dynat_inner"),
    ("train_dynat.dynat_step", "with eval_mode(target):", "if True:", "dynat_inner"),
    ("train_dynat.dynat_step", "            target(x)  # no loss term",
        "            pass  # no loss term", "dynat_inner"),
    ("train_dynat.dynat_step", "adv_logits = target(x_adv)", "adv_logits = target(x)", "dynat_inner"),
    ("train_dynat.dynat_step", "beta * loss_target", "2 * beta * loss_target", "dynat_inner"),
    ("train_dynat.dynat_step", "F.cross_entropy(logits, labels, reduction=",
        "F.cross_entropy(logits, y, reduction=", "dynat_inner"),
    ("train_dynat.dynat_step", "kl_divergence(clean_logits, logits)",
        "kl_divergence(logits, clean_logits)", "dynat_kl_inner"),
    ("train_dynat.dynat_step", "clean_logits = target(x)", "clean_logits = target(start)", "dynat_kl_inner"),
    ("variants.awp.dynat_awp_step", "y, AWP_KL_WEIGHT", "y, kl_weight", "dynat_awp"),
    ("variants.awp.dynat_awp_step", "target(x_adv), y, AWP", "target(x_adv), labels, AWP", "dynat_awp"),
    ("variants.awp.dynat_awp_step", "kl_divergence(clean_logits, adv_logits)",
        "kl_divergence(adv_logits, clean_logits)", "dynat_awp"),
    ("variants.awp.dynat_awp_step", "kl_divergence(clean_logits, adv_logits)",
        "kl_divergence(clean_logits.detach(), adv_logits)", "dynat_awp"),
    ("variants.awp.dynat_awp_step", "epoch >= awp_start", "epoch > awp_start", "dynat_awp"),
    ("variants.awp.dynat_awp_step", "        optimizer.step()\n", "    optimizer.step()\n", "dynat_awp"),
    ("variants.awp.dynat_awp_step", "epoch >= awp_start", "True", "dynat_awp_warmup"),
    ("variants.awp.dynat_awp_step", "F.cross_entropy(logits, labels, reduction=",
        "F.cross_entropy(logits, y, reduction=", "dynat_inner_awp"),
    ("variants.awp.at_awp_step", "    x_adv = linf_pgd(",
        "    with __import__('attacks').eval_mode(target): x_adv = linf_pgd(", "at_awp"),
    ("variants.awp.at_awp_step", "F.cross_entropy(target(x_adv), y, ", "F.cross_entropy(target(x), y, ", "at_awp_norm"),
    ("variants.awp.trades_awp_step", "epoch >= awp_start", "False", "trades_awp"),
    ("variants.awp.trades_awp_step", "        optimizer.step()\n", "    optimizer.step()\n", "trades_awp"),
    ("variants.fat.fat_step", "mistakes <= tau", "mistakes <= tau + 1", "fat_tau0"),
    ("variants.fat.fat_step", "mistakes <= tau", "mistakes < tau", "fat_tau3"),
    ("variants.fat.fat_step", "if first <= epoch", "if first <= epoch + 1", "fat_tau0"),
    ("variants.fat.fat_step", "if first <= epoch", "if first < epoch", "fat_tau1_osc"),
    ("variants.gairat.gairat_step", "epoch > burn_in", "epoch > burn_in + 1", "gairat"),
    ("variants.gairat.gairat_step", "epoch > burn_in", "epoch >= burn_in", "gairat_cap"),
    ("variants.gairat.dynat_gairat_step", "attacked = labels if inner else y", "attacked = labels", "dynat-gairat"),
    ("variants.gairat.dynat_gairat_step", "attacked = labels if inner else y", "attacked = y", "dynat-inner-gairat"),
    ("variants.gairat.dynat_gairat_step", "label_smoothing=label_smoothing", "label_smoothing=0.1", "dynat-gairat"),
    ("variants.gairat.dynat_gairat_step", "F.cross_entropy(adv_logits, labels,",
        "F.cross_entropy(adv_logits, y,", "dynat-gairat"),
    ("variants.gairat.dynat_gairat_step", "gairat_weights(kappa, ",
        "gairat_weights(kappa.new_tensor([3] * 8), ", "dynat-inner-gairat"),
    ("variants.gairat.dynat_gairat_step", "beta * loss_target", "loss_target", "dynat-gairat"),
    ("variants.lbgat.lbgat_step", "logit_mse(adv_logits, guide_logits)",
        "logit_mse(adv_logits, guide_logits.detach())", "lbgat"),
    ("variants.lbgat.lbgat_step", "kl_divergence(clean_logits, logits)",
        "kl_divergence(logits, clean_logits)", "lbgat"),
    ("variants.mail.mail_step", "epoch > burn_in", "epoch >= burn_in", "mail_at_burnin"),
    ("variants.mail.mail_step", "mail_weights(adv_logits, y)", "mail_weights(target.eval()(x_adv), y)", "mail_at"),
    ("variants.mail.dynat_mail_step", "attacked = labels if inner else y", "attacked = labels", "dynat-mail"),
    ("variants.mail.dynat_mail_step", "F.cross_entropy(adv_logits, labels,",
        "F.cross_entropy(adv_logits, y,", "dynat-mail"),
    ("variants.mail.dynat_mail_step", "mail_weights(adv_logits, labels)",
        "mail_weights(adv_logits, y)", "dynat-inner-mail"),
    ("variants.mail.dynat_mail_step", "epoch > burn_in", "epoch > burn_in + 1", "dynat-inner-mail"),
    ("variants.mail.mail_mse_step", "mail_weights(adv_logits, y)",
        "mail_weights(adv_logits, guide_logits.argmax(1))", "mail-mse"),
    ("variants.mail.mail_mse_step", "logit_mse(adv_logits, guide_logits)",
        "logit_mse(adv_logits, guide_logits.detach())", "mail-mse"),
    ("variants.mart.mart_step", "with eval_mode(target):", "if True:", "mart"),
    ("variants.mart.mart_step", "mart_loss(clean_logits, adv_logits",
        "mart_loss(clean_logits.detach(), adv_logits", "mart"),
    ("variants.pgd_at.pgd_at_step", "    x_adv = linf_pgd(",
        "    with __import__('attacks').eval_mode(target): x_adv = linf_pgd(", "pgd_at_rice"),
    ("variants.pgd_at.pgd_at_step", "target(x_adv)  # no loss term", "pass  #", "pgd_at_rice"),
    ("variants.pgd_at.pgd_at_step", "target(x)  # no loss term", "pass  #", "pgd_at_rice"),
    ("variants.sat.sat_step", "(epoch - easy_until)", "(epoch - easy_until + 4)", "sat_gap20"),
    ("variants.sat.sat_step", "<= limit", "<= 2 * limit + 0.1", "sat_gap00"),
    ("variants.trades.trades_step", "target(x)  # the release's second", "pass  # the release's second", "trades"),
    ("variants.trades.trades_step", "trades_loss(clean_logits,", "trades_loss(clean_logits.detach(),", "trades"),
    ("attacks.counting_pgd", "kappa.add_(logits.argmax(1) == labels)",
        "count.k = getattr(count, 'k', -1) + 1; kappa.add_((logits.argmax(1) == labels) & (kappa == count.k))",
        "gairat_osc"),
    ("attacks.counting_pgd", "return torch.ones_like(labels, dtype=torch.bool)",
        "return logits.argmax(1) == labels", "gairat"),
    ("attacks.weight_perturbation", 'p.dim() > 1 and "weight" in name', "True", "dynat_awp"),
    ("attacks.weight_perturbation", 'p.dim() > 1 and "weight" in name', '"weight" in name', "dynat_awp"),
    ("attacks.weight_perturbation", "buffer.copy_(before)", "pass", "dynat_awp"),
    ("attacks.weight_perturbation", "w.sub_(v)", "pass", "dynat_awp"),
    ("attacks.weight_perturbation", "g for w, g in pairs]", "-g for w, g in pairs]", "dynat_awp"),
    ("attacks.weight_perturbation", "gamma * w.norm()", "gamma", "trades_awp"),
    ("attacks.weight_perturbation", "gamma * w.norm()", "2 * gamma * w.norm()", "at_awp"),
    ("attacks.linf_pgd", "range(steps)", "range(steps - 1)", "trades_kl_attack"),
    ("attacks.linf_pgd", "range(steps)", "range(steps - 1)", "pgd_ce_attack"),
    ("attacks.linf_pgd", "range(steps)", "range(steps - 1)", "eval_pgd_trades"),
    ("attacks.linf_pgd", "low, high = x", "low, high = start", "trades_kl_attack"),
    ("attacks.linf_pgd", "low, high = x", "low, high = start", "pgd_ce_attack"),
    ("attacks.linf_pgd", "low, high = x", "low, high = start", "eval_pgd_trades"),
    ("losses.trades_loss", "kl_divergence(clean_logits, adv_logits)",
        "kl_divergence(adv_logits, clean_logits)", "trades"),
    ("losses.mart_loss", "bce + kl_weight * kl * (1.0000001 - p_y)",
        "(bce + kl_weight * kl) * (1.0000001 - p_y)", "mart"),
    ("losses.mart_loss", "p_y = p.gather", "p_y = q.gather", "mart"),
    ("losses.mart_loss", "(1.0000001 - p_y)", "(1.0000001 - p_y).detach()", "mart"),
    ("losses.mart_loss", "_largest_other(q, y)", "q.amax(1)", "mart"),
    ("losses.mart_loss", "1.0001", "1.001", "mart"),
    ("losses.logit_mse", ".mean(1)", ".sum(1)", "lbgat"),
    ("losses.probability_gap", "p = F.softmax(logits, 1)", "p = logits", "sat_gap20"),
    ("losses.gairat_weights", "weights / (total / count)", "weights", "gairat"),
    ("losses.gairat_weights", "shift: float = -1.0", "shift: float = 0.0", "gairat"),
    ("losses.gairat_weights", "torch.tanh(shift + 5", "torch.tanh(shift - 5", "gairat"),
    ("losses.mail_weights", "3 * torch", "torch", "mail_at"),
    ("losses.mail_weights", "bias: float = -0.5", "bias: float = 0.5", "mail_at"),
    ("losses.mail_weights", "adv_logits.detach()", "adv_logits", "mail_at"),
    ("losses.mail_weights", "probability_gap(", "-probability_gap(", "mail_at"),
    ("attacks.pgd", "active=still_correct", "active=None", "eval_pgd10"),
    ("attacks.pgd", 'F.cross_entropy(logits, y, reduction="sum")', "-margin(logits, y).sum()", "eval_pgd10"),
    ("attacks.pgd", "active=still_correct", "active=None", "eval_pgd20"),
    ("attacks.pgd", 'F.cross_entropy(logits, y, reduction="sum")', "-margin(logits, y).sum()", "eval_pgd20"),
    ("attacks.cw", "active=still_correct", "active=None", "eval_cw20"),
    ("attacks.cw", "-margin(logits, y).sum()", 'F.cross_entropy(logits, y, reduction="sum")', "eval_cw20"),
]  # fmt: skip
GOLDEN_TESTS = [
    (test_golden.UPDATES, test_golden.test_the_update_agrees_with_the_release),
    (test_golden.HYBRIDS, test_golden.test_a_hybrid_uses_dynamic_labels_where_it_says),
    (test_golden.TRAINING_ATTACKS, test_golden.test_the_attack_agrees_with_the_release),
    (test_golden.EVALUATION_ATTACKS, test_golden.test_the_evaluation_attack_agrees_with_the_release),
]


@pytest.mark.parametrize(("name", "old", "new", "case"), GOLDEN)
def test_a_golden_value_notices(float64, name, old, new, case):
    (test,) = [test for cases, test in GOLDEN_TESTS if case in cases]
    with mutant(name, old, new), pytest.raises(AssertionError, match="differs"):
        test(golden_files()[0], case)


FAR = {"seed": 0, "objective": "cross-entropy", "epsilon": 0.031, "step_size": 0.5, "steps": 2, "spread": 0.05}
NEAR = {"seed": 0, "objective": "margin", "epsilon": 0.3, "step_size": 0.05, "steps": 3, "spread": 0.0}
BALL = partial(test_attacks.check_ball_and_pixel_range, **FAR)
BATCH = partial(test_attacks.check_batch_equals_single_images, **NEAR)
UNTOUCHED = test_attacks.test_attack_leaves_modes_gradients_batchnorm_and_random_state_untouched
GROWS = test_attacks.test_the_objective_grows
ACTIVE = test_attacks.test_one_forward_per_step_where_noise_enters_and_only_active_images_move
LABELS = partial(test_losses.check_labels, [[0.0, 1.0, 1.0, 0.0]])
KL = partial(test_losses.check_kl, [([2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])])
REPORT = test_methods.test_every_method_reports_its_loss_and_what_is_classified_right
BETA = test_methods.check_beta
STATIC_LABELS = test_methods.check_static_labels
CLEAN_FORWARD = test_methods.test_the_clean_forward_moves_the_targets_batchnorm
FAT = test_methods.test_fat_counts_a_mistake_that_was_undone
SCHEDULE = test_training.check_schedules

# Noticed by a property. The last cell is the method, where the test has one.
PROPERTIES = [
    ("variants.mail.dynat_mail_step", "(adv_logits.argmax(1) == y)",
        "(adv_logits.argmax(1) == labels)", REPORT, "dynat-mail"),
    ("variants.mail.dynat_mail_step", "guide_loss(guide_logits, y)",
        "guide_loss(guide_logits, labels)", STATIC_LABELS, "dynat-mail"),
    ("variants.mail.dynat_mail_step", "mail_weights(adv_logits, labels)",
        "mail_weights(adv_logits, guide_labels)", STATIC_LABELS, "dynat-mail"),
    ("variants.mail.dynat_mail_step", "attacked = labels",
        "attacked = guide_labels", STATIC_LABELS, "dynat-inner-mail"),
    ("variants.trades.trades_step", "adv_logits.argmax(1) == y",
        "adv_logits.argmin(1) == y", REPORT, "trades"),
    ("variants.trades.trades_step", '"loss": loss.detach()', '"loss": loss', REPORT, "trades"),
    ("variants.mail.mail_mse_step", "guide_logits.argmax(1) == y",
        "guide_logits.argmax(1) != y", REPORT, "mail-mse"),
    ("train_dynat.dynat_step", "loss_guide + beta * loss_target",
        "loss_guide + loss_target", BETA, "dynat"),
    ("train_dynat.dynat_step", "adv_logits = target(x_adv)",
        "adv_logits = target(x_adv) + guide(x_adv)", BETA, "dynat-inner"),
    ("train_dynat.dynat_step", "target(x)  # no loss term",
        "pass  # no loss term", CLEAN_FORWARD, "dynat"),
    ("train_dynat.dynat_step", "if clean_forward:", "if True:", CLEAN_FORWARD, "dynat"),
    ("train_dynat.dynat_step", "dynamic_labels(guide_logits)",
        "dynamic_labels(guide(x))", CLEAN_FORWARD, "dynat-inner"),
    ("train_dynat.dynat_step", "labels = y if static_labels",
        "labels = guide_labels = y if static_labels", STATIC_LABELS, "dynat"),
    ("train_dynat.dynat_step", "cross_entropy(logits, labels,",
        "cross_entropy(logits, guide_labels,", STATIC_LABELS, "dynat-inner"),
    ("variants.awp.dynat_awp_step", "loss_guide + beta * loss_target",
        "beta * loss_guide + loss_target", BETA, "dynat-awp"),
    ("variants.awp.dynat_awp_step", "target_loss(adv_logits, labels)",
        "target_loss(adv_logits, guide_labels)", STATIC_LABELS, "dynat-awp"),
    ("variants.awp.dynat_awp_step", "cross_entropy(logits, labels,",
        "cross_entropy(logits, guide_labels,", STATIC_LABELS, "dynat-inner-awp"),
    ("variants.gairat.dynat_gairat_step", "(adv_logits, labels,",
        "(adv_logits, guide_labels,", STATIC_LABELS, "dynat-gairat"),
    ("variants.gairat.dynat_gairat_step", "attacked = labels",
        "attacked = guide_labels", STATIC_LABELS, "dynat-inner-gairat"),
    ("variants.fat.fat_step", "mistakes.add_(logits.argmax(1) != y)",
        "mistakes.add_(1).mul_(logits.argmax(1) != y)", FAT),
    ("attacks.eval_mode", "module.training = training", "module.training = True", UNTOUCHED),
    ("attacks.eval_mode", "model.eval()", "pass", UNTOUCHED),
    ("attacks.linf_pgd", "low, high), 0, 1)", "low, high), -9, 9)", BALL),
    ("attacks.linf_pgd", "+ step, low, high)", "+ step, -9, 9)", BALL),
    ("attacks.linf_pgd", "low, high = x", "low, high = start", BALL),
    ("attacks.linf_pgd", "x + epsilon\n", "x + 1.01 * epsilon\n", BALL),
    ("attacks.linf_pgd", "gradient.sign()", "(gradient - gradient.mean(0)).sign()", BATCH),
    ("attacks.linf_pgd", "active(logits.detach())", "active(logits.detach()).roll(1)", BATCH),
    ("attacks.linf_pgd", "logits = model(x_adv)", "logits = model.train()(x_adv)", UNTOUCHED),
    ("attacks.linf_pgd", "(gradient,) = torch.autograd.grad(objective(logits), x_adv)",
        "x_adv.grad = None; objective(logits).backward(); gradient = x_adv.grad", UNTOUCHED),
    ("attacks.linf_pgd", "start.detach()", "start.detach() + 0.01 * torch.randn_like(start)", UNTOUCHED),
    ("attacks.linf_pgd", "step_size * gradient", "-step_size * gradient", GROWS),
    ("attacks.linf_pgd", "range(steps)", "[]", GROWS),
    ("attacks.linf_pgd", "step = step + noise(k)", "noise(k)", ACTIVE),
    ("attacks.linf_pgd", "moved, x_adv.detach())", "moved, moved)", ACTIVE),
    ("losses.dynamic_labels", "argmax(dim=1)", "argmin(dim=1)", LABELS),
    ("losses.dynamic_labels", "argmax(dim=1)", "flip(1).argmax(dim=1).neg() + 3", LABELS),
    ("losses.dynamic_labels", "argmax(dim=1)", "softmax(1)", LABELS),
    ("losses.kl_divergence", "F.kl_div(log_q, log_p,", "F.kl_div(log_p, log_q,", KL),
    ("settings.scale_schedule", "max(2, ", "max(1, ", SCHEDULE),
    ("settings.scale_schedule", "1 + (epoch - 1) *", "epoch *", SCHEDULE),
    ("settings.scale_schedule", "epoch <= 1", "epoch < 0", SCHEDULE),
    ("settings.scale_schedule", "moved(first_weighted) - 1", 'moved(settings["burn_in"])', SCHEDULE),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "test", "method"), [(*row, None)[:5] for row in PROPERTIES])
def test_a_property_notices(name, old, new, test, method):
    with mutant(name, old, new), pytest.raises(AssertionError):
        test(method) if method else test()


@pytest.mark.parametrize(("name", "old", "new"), [
    ("attacks.pgd", "active=still_correct", "active=None"),
    ("attacks.cw", "active=still_correct", "active=None"),
    ("attacks.cw", "-margin(logits, y)", "margin(logits, y)"),
    ("attacks.pgd", "F.cross_entropy(logits, y,", "-F.cross_entropy(logits, y,"),
])  # fmt: skip
def test_an_attack_that_moves_fooled_images_or_the_wrong_way_is_noticed(request, name, old, new):
    attack, arguments = pkgutil.resolve_name(name), map(request.getfixturevalue, ("model", "images"))
    with mutant(name, old, new), pytest.raises(AssertionError):
        test_evaluate.test_a_fooled_image_stays_fooled(attack, *arguments)


@pytest.mark.parametrize(("name", "old", "new"), [
    ("checkpoints.load_state", 'load_momentum(optimizer, checkpoint["optimizer"])', "pass"),
    ("train_dynat.train", "load_state(checkpoint, models,", "load_state(checkpoint, networks,"),
    ("train_dynat.train", "range(len(log) + 1, epochs + 1)", "range(1, epochs + 1)"),
    ("train_dynat.train_epoch", "first_update = epoch == 1 and", "first_update ="),
])  # fmt: skip
def test_a_resume_that_forgets_something_is_noticed(request, tmp_path, name, old, new):
    run_dir, copies, _, _ = request.getfixturevalue("whole")
    with mutant(name, old, new), pytest.raises(AssertionError):
        test_training.check_resume(tmp_path, copies[6], run_dir)  # its second epoch is not saved


@pytest.mark.parametrize(("name", "old", "new"), [
    ("robustness.attack_columns", "x_advs[column.before].clone()", "x_advs[0].clone()"),
    ("saved_images.SavedImages.write", "place * self.total + int(batch[0])", "place * self.total"),
])  # fmt: skip
def test_other_saved_images_than_the_attacked_ones_are_noticed(request, tmp_path, capsys, name, old, new):
    arguments = map(request.getfixturevalue, ("run", "model"))
    with mutant(name, old, new), pytest.raises(AssertionError):
        test_evaluate.test_saved_images_are_in_the_ball_and_have_the_matrixs_verdicts(*arguments, tmp_path, capsys)
