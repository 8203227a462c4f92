"""Makes the scripts of examples/benchmarks importable, as they are for one another when one of them runs."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
