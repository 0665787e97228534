"""Lets the tests import `long_range`, which is not installed: the demo runs where it stands."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
