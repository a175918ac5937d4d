"""sentence-transformers and colpali-engine over our backbone, tokenizer and image sizes."""

import sys
import types
from typing import Any

from torch import Tensor, nn
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as on_pillow


def without_torchvision() -> None:
    """Let colpali-engine be imported without torchvision: call this first.

    It imports one function from the module of transformers' torchvision image processor, which the
    one on Pillow has as well.
    """
    name = on_pillow.__name__.replace("_pil", "")
    stand_in = types.ModuleType(name)
    stand_in.smart_resize = on_pillow.smart_resize  # type: ignore[attr-defined]
    sys.modules[name] = stand_in


def processor_of(kind: Any, tokenizer: Any, ours: Any, **options: Any) -> Any:
    """A library's processor with our tokenizer and transformers' own image processor.

    Args:
        kind: its class. Only videos would need torchvision, so it is built without them.
        tokenizer: gets the names of the special tokens.
        ours: our image processor: its patches are the same, made in less time.
        options: of the class.
    """

    class WithoutVideos(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    names = ("size", "patch_size", "merge_size", "temporal_patch_size")
    theirs = on_pillow.Qwen2VLImageProcessorPil(**{name: getattr(ours, name) for name in names})
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    return WithoutVideos(theirs, tokenizer, **options)


def colqwen_processor(tokenizer: Any, ours: Any) -> Any:
    """ColQwen2.5's processor; see `processor_of`."""
    without_torchvision()
    from colpali_engine.models.qwen2_5.colqwen2_5.processing_colqwen2_5 import (  # pyright: ignore
        ColQwen2_5_Processor,
    )

    return processor_of(ColQwen2_5_Processor, tokenizer, ours)


class HiddenStates(nn.Module):
    """A SentenceTransformer's first module, where theirs reads its model from a folder or hub."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Adds the last hidden states."""
        output = self.backbone(**features, use_cache=False)
        return {**features, "token_embeddings": output.last_hidden_state}
