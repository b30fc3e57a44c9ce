"""Draw the plots of a report of the serving benchmark.

python scripts/bench_serve_plot.py scripts/results/GPU/serve-DATE.json     # draws the PNG beside it
"""

import argparse
import json
from pathlib import Path

from bench.serve.plot import plot

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Draw the plots of a report of the serving benchmark."
    )
    parser.add_argument("report", type=Path, help="a JSON file that bench_serve.py has written")
    source = parser.parse_args().report
    plot(json.loads(source.read_text()), source.with_suffix(".png"))
