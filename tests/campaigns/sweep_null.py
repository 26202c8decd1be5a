"""Sweeps where nothing was planted, to be run by hand: ``OMP_NUM_THREADS=1 python tests/campaigns/sweep_null.py``.

The long form of ``test_nothing_is_found_where_nothing_was_planted``: over 60 draws of labels, the interval of the layer
that validation chose covers 50 % about as often as it claims. 95 % of 60 is 57; a binomial with that chance is below 52
three times in a thousand.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from scipy.stats import binom

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_sweep import null_coverage


def main():
    """Print the draws that were covered; exit code 1 if they are fewer than chance explains (0.3 %)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=60)
    draws = parser.parse_args().draws
    with tempfile.TemporaryDirectory() as folder:
        covered = null_coverage(Path(folder), range(draws))
    fewest = int(binom.ppf(0.003, draws, 0.95))
    sys.stdout.write(f"{covered} of {draws} intervals cover 50 %; at least {fewest} must\n")
    sys.exit(covered < fewest)


if __name__ == "__main__":
    main()
