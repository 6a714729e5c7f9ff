"""Importing this puts benchmarks/ on the path: the runners are plain scripts in environments without this package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
