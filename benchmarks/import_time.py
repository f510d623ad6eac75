"""Time of ``import skaipo`` against ``import sklearn, torch``, in fresh interpreters.

    python benchmarks/import_time.py

The two are interleaved; what is printed is the median and the range of the paired quotients.
"""

import argparse
import statistics
import subprocess
import sys
import time

import skaipo


def seconds(statement):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    seconds("import skaipo")  # byte code and disk cache
    pairs = [
        (seconds("import sklearn, torch"), seconds("import skaipo")) for _ in range(args.repeats)
    ]
    ratios = sorted(mine / base for base, mine in pairs)
    print(
        f"import skaipo {skaipo.__version__}: {statistics.median(m for _, m in pairs):.2f} s, "
        f"import sklearn, torch: {statistics.median(b for b, _ in pairs):.2f} s, "
        f"quotient {statistics.median(ratios):.3f} (range {ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


if __name__ == "__main__":
    main()
