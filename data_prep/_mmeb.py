"""Common parts of MMEB's layouts: names of subsets, texts with a placeholder, pictures."""

from pathlib import Path
from typing import Any

from metaembed_pl.data_prep._rows import Named, fetch

PLACEHOLDER = "<|image_1|>"
"""Where the picture stood in a text. Our prompt says itself where pictures stand."""

TRAIN_SUBSETS = (
    "ImageNet_1K",
    "N24News",
    "HatefulMemes",
    "VOC2007",
    "SUN397",
    "OK-VQA",
    "A-OKVQA",
    "DocVQA",
    "InfographicsVQA",
    "ChartQA",
    "Visual7W",
    "VisDial",
    "CIRR",
    "VisualNews_t2i",
    "VisualNews_i2t",
    "MSCOCO_t2i",
    "MSCOCO_i2t",
    "NIGHTS",
    "WebQA",
    "MSCOCO",
)


def item(text: str | None, image: str | None, places: tuple[Path, ...]) -> dict[str, Any]:
    r"""An item of a draft, of a text with its placeholder and a picture's path, if any.

    >>> item("<|image_1|>\nWhat is this?", "", ())
    {'text': 'What is this?', 'image': None}
    """
    words = (text or "").replace(PLACEHOLDER, "").strip()
    return {"text": words, "image": Named(image, places) if image else None}


def places(where: str, *zips: str) -> tuple[Path, ...]:
    """Where pictures may be: unpacked in the copy, or in these zips, which are fetched.

    Args:
        where: an id of the hub, or a folder.
        zips: paths of zips there; those that are not there are left out.
    """
    folders = (Path(where),) if Path(where).is_dir() else ()
    return (*folders, *(path for name in zips if (path := fetch(where, name))))
