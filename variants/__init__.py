"""The other rows of the paper's tables, a file per method: its step, where its attack begins, its published settings.

Steps repeat the skeleton of `dynat_step`, so that each can be read beside its formula and copied away; the formulas are
in losses.py, the attack in attacks.py, the weight perturbation in awp.py. train_dynat.py says what METHODS holds.
"""

from variants import (
    at_awp,
    dynat_awp,
    dynat_gairat,
    dynat_mail,
    fat,
    gairat,
    lbgat,
    mail,
    mail_mse,
    mart,
    pgd_at,
    sat,
    trades,
    trades_awp,
)

METHODS = {
    **dynat_awp.METHODS,
    **dynat_gairat.METHODS,
    **dynat_mail.METHODS,
    **pgd_at.METHODS,
    **trades.METHODS,
    **mart.METHODS,
    **fat.METHODS,
    **sat.METHODS,
    **gairat.METHODS,
    **mail.METHODS,
    **mail_mse.METHODS,
    **at_awp.METHODS,
    **trades_awp.METHODS,
    **lbgat.METHODS,
}
