import os
import sys
from pathlib import Path

import pytest

# Tests run tiny models: more threads only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

# Files that train, export or start processes, longest first; `make test-fast` leaves them out.
SLOW = """
    training/test_zero training/test_scale benchmarks/test_gpu training/test_fit cli/test_mine
    cli/test_recipes cli/test_check training/test_memory tests/test_rehearsal
    retrieval/test_store retrieval/test_qdrant benchmarks/test_real_shapes
    training/test_watchdog cli/test_embed training/test_options data_prep/test_emoji
    benchmarks/test_study field/test_stopping field/test_fuzz cli/test_evaluate
    retrieval/test_index model/test_vision field/test_tracking evaluation/test_run
    training/test_faults training/test_extras model/test_embedder cli/test_hub_refusals
    cli/test_export serving/test_serve model/test_families tests/test_wheel model/test_lora
    cli/test_push training/test_tracking training/test_checkpoints retrieval/test_projection
    evaluation/test_mteb training/test_gradient_cache model/test_encoding
    evaluation/test_baselines retrieval/test_calibration field/test_named field/test_damage
    model/test_pooling retrieval/test_embedding training/test_questions training/test_metrics
    model/test_patches data_prep/test_pdf model/test_library_processors model/test_export
    cli/test_tune
""".split()


def pytest_collection_modifyitems(items):
    """The longest files first: several processes then end at about the same time."""
    places = {}
    for item in items:
        name = f"{item.path.parent.name}/{item.path.stem}"
        if name in SLOW:
            item.add_marker(pytest.mark.slow)
            places[item.path] = SLOW.index(name)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: places.get(item.path, len(SLOW) + (item.path not in slow)))
