"""Let the tests import `long_range`, which is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
