"""Tests of exercise 3: ``python -m pytest docs/exercises/test_trained_numbers.py``."""

from trained_numbers import trained

from spafit.experiments.report.published import TABLE_2


def test_table_2() -> None:
    """All six SPAFIT rows of the paper's Table 2, as printed (bert-large, r 64, MNLI's labels)."""
    for method, (millions, _) in TABLE_2.items():
        if method.startswith("SPAFIT"):
            _, N1, N2, kind = method.split("-")
            found = trained(1024, 4096, 24, 64, 3, int(N1), int(N2), kind)
            assert round(found / 1e6, 2) == millions, method


def test_4_9_ii_to_the_last_digit() -> None:
    """The row that the README draws."""
    assert trained(1024, 4096, 24, 64, 3, 4, 9, "II") == 7_485_443
