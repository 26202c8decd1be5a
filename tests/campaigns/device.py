"""Dumps of every family on a pretended CUDA device, to be run by hand: ``python tests/campaigns/device.py``.

The long form of ``test_a_dump_is_that_of_the_cpu``: no operation mixes devices, and features are those of the CPU.
"""

import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_device import dumps_on_both
from tiny_families import all_pipelines


def main():
    """Print the largest relative difference of each family; exit code 1 if one is above 2e-4."""
    warnings.simplefilter("ignore")
    worst = 0.0
    for name, builder in sorted(all_pipelines().items()):
        with tempfile.TemporaryDirectory() as folder:
            apart = dumps_on_both(builder, Path(folder))
        worst = max(worst, apart)
        sys.stdout.write(f"{name} {apart:.1e}\n")
        sys.stdout.flush()
    sys.exit(worst > 2e-4)


if __name__ == "__main__":
    main()
