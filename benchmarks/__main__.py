"""Run the benchmarks: `python -m benchmarks`, or with `--smoke` on small arrays to see that they run."""

import argparse

from benchmarks import projections

if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small arrays, to see that it runs")
    projections.run(smoke=parser.parse_args().smoke)
