"""The short set: training step, inference and loading, in under 10 minutes on 2 CPU cores.

    python -m benchmarks --out runs/bench

Each measurement runs in a process of its own and writes its CSV, table and figure to the folder.
The full ones, with the options that these lack, are the scripts themselves.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

#: Name of the output -> module and options.
SHORT_SET = {
    "train_step_large": "train_step --task rte --batches 3 --kept-prefix",
    "train_step_minilm": "train_step --task rte --batches 5 --model-shape minilm --memory",
    "inference_large": "inference --task rte --rows 64 --repeats 1",
    "load_large": "load --repeats 3",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the short set; what fails stops it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="a folder")
    parser.add_argument("--only", choices=SHORT_SET, nargs="+", default=list(SHORT_SET))
    parsed = parser.parse_args(arguments)
    began = time.monotonic()
    for name in parsed.only:
        module, *options = SHORT_SET[name].split()
        print(f"\npython -m benchmarks.{SHORT_SET[name]}\n", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{module}", *options]
        subprocess.run([*command, "--out", str(parsed.out / name)], check=True)
        print(f"{time.monotonic() - began:.0f} s so far", flush=True)


if __name__ == "__main__":
    main()
