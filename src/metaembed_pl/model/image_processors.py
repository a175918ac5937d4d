"""Image processors that need only Pillow, and a fast one for the Qwen families.

transformers' AutoImageProcessor requires torchvision until 5.17, and a model's file may name the
torchvision class.

For the Qwen families, the library converts a picture to floats and rearranges these into patches.
Here bytes are rearranged, and converted at the end by a table of 256 values per channel, which is
computed with the library's own arithmetic: the results are bit-identical.

Shape letters: C channels, N patches, T frames a patch, P pixels a patch.
"""

import re
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as library
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from metaembed_pl.errors import UserError


class Qwen2VLImageProcessorPil(library.Qwen2VLImageProcessorPil):
    """The library's class under its own name, which is what a model folder says."""

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Patches of pictures; of anything but RGB pictures from Pillow, as the library does."""
        flat = [image for nested in images for image in _listed(nested)] if images else []
        is_usual = self.do_resize and self.do_rescale and self.do_normalize and flat
        if not is_usual or kwargs.keys() - {"return_tensors"} or not all(map(_is_rgb, flat)):
            return super().preprocess(images, **kwargs)
        sizes = [self._size(image) for image in flat]
        grids = [(height // self.patch_size, width // self.patch_size) for height, width in sizes]
        ends = np.cumsum([rows * columns for rows, columns in grids])
        shape = ends[-1], 3, self.temporal_patch_size, self.patch_size**2
        # One array for all: new pages of memory cost more than the arithmetic.
        found, table = np.empty(shape, np.float32), self._table()
        for image, size, part in zip(flat, sizes, np.split(found, ends[:-1]), strict=True):
            look_up(table, self._patches(image, size), part)
        data = {"pixel_values": found.reshape(ends[-1], -1)}
        data["image_grid_thw"] = np.array([(1, *grid) for grid in grids])
        return BatchFeature(data, tensor_type=kwargs.get("return_tensors"))

    def _size(self, image: Image.Image) -> tuple[int, int]:
        """Height and width that are multiples of the patch, within the limits."""
        size = dict(self.size)
        return library.smart_resize(
            image.height,
            image.width,
            factor=self.patch_size * self.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )

    def _patches(self, image: Image.Image, size: tuple[int, int]) -> UInt8[np.ndarray, "N C P"]:
        """The bytes of a picture, by patch: those that are merged stand together."""
        (height, width), side, merge = size, self.patch_size, self.merge_size
        pixels = np.asarray(image.resize((width, height), self.resample))
        step = merge * side
        pixels = pixels.reshape(height // step, merge, side, width // step, merge, side, 3)
        return pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, side * side)

    def _table(self) -> Float[np.ndarray, "C 256"]:
        """The value of each byte after the library's preprocessing, by channel."""
        every = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (3, 256, 1))
        scaled = self.rescale(every, self.rescale_factor)
        return self.normalize(scaled, self.image_mean, self.image_std)[..., 0].astype(np.float32)


def look_up(
    table: Float[np.ndarray, "C 256"],
    patches: UInt8[np.ndarray, "N C P"],
    found: Float[np.ndarray, "N C T P"],
) -> None:
    """Fills `found` with the values of bytes; a still picture is the same in every frame.

    >>> table = np.arange(512, dtype=np.float32).reshape(2, 256)
    >>> found = np.empty((1, 2, 2, 2), np.float32)
    >>> look_up(table, np.array([[[1, 2], [0, 3]]], dtype=np.uint8), found)
    >>> found.reshape(-1)
    array([  1.,   2.,   1.,   2., 256., 259., 256., 259.], dtype=float32)
    """
    for channel, values in enumerate(table):
        found[:, channel] = values.take(patches[:, channel])[:, None]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_rgb(image: Any) -> bool:
    return isinstance(image, Image.Image) and image.mode == "RGB"


CLASSES = {
    each.__name__.removesuffix("Pil"): each
    for each in (
        Gemma3ImageProcessorPil,
        Idefics3ImageProcessorPil,
        MllamaImageProcessorPil,
        Qwen2VLImageProcessorPil,
        SiglipImageProcessorPil,
        SmolVLMImageProcessorPil,
    )
}


def load_image_processor(path: str, revision: str | None = None) -> Any:
    """The image processor of a model folder or hub id; an OSError if its file is missing."""
    settings, _ = ImageProcessingMixin.get_image_processor_dict(path, revision=revision)
    named = settings.get("image_processor_type", "no kind")
    found = CLASSES.get(re.sub(r"(Pil|Fast)$", "", named))
    if found is None:
        raise UserError(
            f"{path}: its image processor is of {named}, expected one of {', '.join(CLASSES)}"
        )
    return found.from_dict(settings)
