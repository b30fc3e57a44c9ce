"""Draw the plots of a report of the serving benchmark.

python scripts/bench_serve_plot.py scripts/results/GPU/serve-DATE.json     # draws the PNG beside it
"""

import json
import sys
from pathlib import Path

from bench.serve.plot import plot

if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(json.loads(source.read_text()), source.with_suffix(".png"))
