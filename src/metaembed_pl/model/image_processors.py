"""Image processors of pretrained models, with the classes that need only Pillow.

transformers' AutoImageProcessor requires torchvision until 5.17, and a model's file may name the
torchvision class.
"""

import re
from typing import Any

from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from metaembed_pl.errors import UserError
from metaembed_pl.model.qwen_pictures import Qwen2VLImageProcessorPil

KINDS = {
    kind.__name__.removesuffix("Pil"): kind
    for kind in (
        Gemma3ImageProcessorPil,
        Idefics3ImageProcessorPil,
        MllamaImageProcessorPil,
        Qwen2VLImageProcessorPil,
        SiglipImageProcessorPil,
        SmolVLMImageProcessorPil,
    )
}


def load_image_processor(path: str, revision: str | None = None) -> Any:
    """The image processor of a model folder or hub id.

    Raises:
        OSError: its file is missing.
        UserError: it is of a kind that no supported family has.
    """
    settings, _ = ImageProcessingMixin.get_image_processor_dict(path, revision=revision)
    named = settings.get("image_processor_type", "no kind")
    kind = KINDS.get(re.sub(r"(Pil|Fast)$", "", named))
    if kind is None:
        raise UserError(
            f"{path}: its image processor is of {named}, expected one of {', '.join(KINDS)}"
        )
    return kind.from_dict(settings)
