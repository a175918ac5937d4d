import os
import sys
from pathlib import Path

# Tests run tiny models: more threads only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
