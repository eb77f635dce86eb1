"""One trunk, many tasks: several adapters of one model on one batch, merged, copied and added up.

:mod:`~spafit.trunk.batches` computes several adapters on the sequences of one batch;
:mod:`~spafit.trunk.merging` folds an adapter into its base and undoes it;
:mod:`~spafit.trunk.combining` begins an adapter with another, or adds several up.
"""
