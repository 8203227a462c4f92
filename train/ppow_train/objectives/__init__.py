"""What is minimised when windows lie on the target's own trajectories: window objectives, supervised ones, mixtures.

Published PPOW is not here: its clipped group-relative loss is TRL's own, fed by rollout.py and rewards.py. Every
objective here is a mean over windows and needs no sampling: y is the target's trajectory, p and q the target and
draft distributions along it. Where a head drafts from a reduced vocabulary, what is about acceptance (exact, overlap,
drafts, tv, nla) takes p as it is, what is about likeness (ce, kl_div, rkl, jsd) p renormalised on the draft vocabulary,
and lk_hybrid each of its parts in its own form; vocabulary.py tells why. choose.py chooses; the formulas are in
window.py, forms.py and supervised.py, as text for the model card in formulas.py, the names in names.py. Nothing is
imported here, as the command line checks names before torch is loaded.
"""
