import os
import sys
from pathlib import Path

import pytest

# Tests run tiny models: more threads only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

# Files that train, export or start processes; `make test-fast` leaves them out.
SLOW = {
    "benchmarks": "test_gpu test_real_shapes",
    "cli": "test_check test_embed test_evaluate test_export test_mine test_push test_recipes"
    " test_hub_refusals test_tune",
    "data_prep": "test_emoji test_pdf",
    "evaluation": "test_baselines test_mteb test_run",
    "field": "test_damage test_fuzz test_named test_stopping test_tracking",
    "model": "test_embedder test_encoding test_export test_families test_library_processors"
    " test_lora test_patches test_pooling test_vision",
    "retrieval": "test_calibration test_embedding test_index test_projection test_qdrant"
    " test_store",
    "serving": "test_serve",
    "tests": "test_wheel",
    "training": "test_checkpoints test_extras test_faults test_fit test_gradient_cache test_memory"
    " test_metrics test_options test_questions test_scale test_tracking test_watchdog test_zero",
}


def pytest_collection_modifyitems(items):
    """Files with slow tests first: several processes then end at about the same time."""
    for item in items:
        if item.path.stem in SLOW.get(item.path.parent.name, "").split():
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
