"""The other rows of the paper's tables, a file per method: its step, where its attack begins, its published settings.

Every file's METHODS is merged into that of train_dynat.py, which explains the fields. Steps repeat the skeleton of
`dynat_step`, so that each can be read beside its formula and copied away; formulas come from losses.py, the attack from
attacks.py, the weight perturbation from awp.py.
"""
