"""The forms in which a run is handed to other programs, a module for each.

Each has ``export(trained, folder) -> notes``: it writes the files of a run
(:class:`spafit.cli.trained.Trained`, not changed) into a folder that exists, and returns what a
user of the files has to know. It raises a PlanError, which names what the program has no form for,
or a WeightsError if a file cannot be written.
"""
