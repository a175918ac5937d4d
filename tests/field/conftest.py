"""The scripts import what they share by name: their folder is on the path, last, as they do it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "data_prep"))
