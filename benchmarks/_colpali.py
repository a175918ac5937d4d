"""Import colpali-engine without torchvision."""

import sys
import types


def without_torchvision() -> None:
    """Let colpali-engine be imported: call this before.

    It imports one function from the module of transformers' torchvision image processor, which the
    one on Pillow has as well.
    """
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as on_pillow

    name = on_pillow.__name__.replace("_pil", "")
    stand_in = types.ModuleType(name)
    stand_in.smart_resize = on_pillow.smart_resize  # type: ignore[attr-defined]
    sys.modules[name] = stand_in
