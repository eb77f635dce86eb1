"""Scores of real runs in two paths side by side: the fast one in half precision, and the plain one.

The fast path is packed, fused and, on a GPU, captured; the plain one computes every operation as
its equation is written, in float32, launched one by one. Dropout draws differently in them, so that
two runs of one seed are two draws of the same experiment; the question is whether the means over
the seeds differ by more than drawing anew does:

    difference = mean(fast) - mean(plain)      its standard error = √((sd²(fast) + sd²(plain)) / n)

"within" means that the difference is at most two standard errors. With three seeds the standard
error is itself rough; of some seven metrics one may well be outside by chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

FAST, PLAIN = "fast", "plain float32"
PATHS = (FAST, PLAIN)


class Settings(NamedTuple):
    """The settings of a run that depend on its path.

    Attributes
    ----------
    impl : str
        Of :func:`spafit.bert.set_impl`.
    training : dict
        Of :class:`spafit.TrainConfig`.
    """

    impl: str
    training: dict[str, Any]


def settings_of_path(path: str, precision: str) -> Settings:
    """Return the settings of a path; ``precision`` is that of the fast one."""
    if path == PLAIN:
        return Settings("reference", {"step": "eager", "precision": "float32"})
    return Settings("auto", {"step": "auto", "precision": precision})


class Difference(NamedTuple):
    """Two paths' scores of one metric.

    Attributes
    ----------
    seeds : int
        Runs of each path.
    fast, plain, fast_sd, plain_sd : float
        Means and standard deviations over the seeds; NaN with one seed.
    error : float
        The standard error of the difference.
    """

    seeds: int
    fast: float
    plain: float
    fast_sd: float
    plain_sd: float
    error: float

    @classmethod
    def of(cls, fast: Sequence[float], plain: Sequence[float]) -> Difference:
        """Compare scores of the same seeds."""
        n = len(fast)
        if n != len(plain):
            raise ValueError(f"{n} runs of the fast path and {len(plain)} of the plain one")
        fast_sd, plain_sd = (statistics.stdev(s) if n > 1 else math.nan for s in (fast, plain))
        error = math.sqrt((fast_sd**2 + plain_sd**2) / n)
        return cls(n, statistics.mean(fast), statistics.mean(plain), fast_sd, plain_sd, error)

    @property
    def verdict(self) -> str:
        """Return whether the difference is within two of its standard errors; "-" with one seed."""
        if math.isnan(self.error):
            return "-"
        return "within" if abs(self.fast - self.plain) <= 2 * self.error else "outside"


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return the rows of both paths, side by side and over their seeds, as Markdown.

    A seed is left out if only one of the paths has been run with it.
    """
    keys = (
        "task", "metric", "method", "learning_rate", "epochs", "train_rows", "device", "torch",
        "commit",
    )  # fmt: skip
    groups: dict[tuple[str, ...], dict[str, dict[str, dict[str, str]]]] = {}
    for row in rows:
        paths = groups.setdefault(tuple(row[key] for key in keys), {path: {} for path in PATHS})
        paths[row["path"]][row["seed"]] = row
    lines = [
        "| task | metric | rows | epochs | seeds | fast (sd) | plain float32 (sd) | difference | "
        "its standard error | difference is | commonest class | fast / plain, examples/s |",
        "|---" * 12 + "|",
    ]
    places = set()
    for paths in groups.values():
        seeds = sorted(paths[FAST].keys() & paths[PLAIN].keys())
        if not seeds:
            continue
        fast, plain = ([paths[path][seed] for seed in seeds] for path in PATHS)
        found = Difference.of(*([float(row["score"]) for row in its] for its in (fast, plain)))
        speeds = [
            statistics.median(float(row["examples_per_s"]) for row in its) for its in (fast, plain)
        ]
        first = fast[0]
        lines.append(
            f"| {first['task']} | {first['metric']} | {first['train_rows']} | {first['epochs']} | "
            f"{found.seeds} | {found.fast:.4f} ({found.fast_sd:.4f}) | {found.plain:.4f} "
            f"({found.plain_sd:.4f}) | {found.fast - found.plain:+.4f} | {found.error:.4f} | "
            f"{found.verdict} | {first['majority']} | {speeds[0]:.0f} / {speeds[1]:.0f} |"
        )
        places.add(
            f"{first['method']}, learning rate {first['learning_rate']}, batch "
            f"{first['batch_size']}, MiniLM ({first['weights_dtype']} file); fast: "
            f"{first['precision']}, step {first['step']}; plain: {plain[0]['precision']}, step "
            f"{plain[0]['step']}; {first['device']}, torch {first['torch']}, spafit "
            f"{first['spafit']}, commit {first['commit']}"
        )
    note = "within: the difference is at most two of its standard errors."
    return "\n".join([*lines, "", note, "", *(f"- {place}" for place in sorted(places)), ""])
