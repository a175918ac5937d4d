import os
import sys
from pathlib import Path

# Tests run tiny models: more threads only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    """Files with slow tests first: several processes then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
