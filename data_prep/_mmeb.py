"""Common parts of MMEB's layouts: names of subsets, texts with a placeholder, pictures."""

from pathlib import Path
from typing import Any

from metaembed_pl.data_prep._rows import Named, fetch
from metaembed_pl.evaluation.mmeb import SETS as MMEB_SETS

PLACEHOLDER = "<|image_1|>"
"""Marks the place of the picture in a text. Our prompt has its own."""

SETS = tuple(name for parts in MMEB_SETS.values() for names in parts for name in names.split())
TRAIN_SUBSETS = tuple(
    name.replace("ImageNet-1K", "ImageNet_1K")
    for in_distribution, _ in MMEB_SETS.values()
    for name in in_distribution.split()
)


def item(text: str | None, image: str | None, places: tuple[Path, ...]) -> dict[str, Any]:
    r"""An item of a draft, from a text with its placeholder and a picture's path, if any.

    >>> item("<|image_1|>\nWhat is this?", "", ())
    {'text': 'What is this?', 'image': None}
    """
    words = (text or "").replace(PLACEHOLDER, "").strip()
    return {"text": words, "image": Named(image, places) if image else None}


def places(where: str, *zips: str) -> tuple[Path, ...]:
    """The places of pictures: unpacked in a copy, or in these zips, which are downloaded.

    Args:
        where: an id on the hub, or a folder.
        zips: paths of zips there; missing ones are left out.
    """
    folders = (Path(where),) if Path(where).is_dir() else ()
    return (*folders, *(path for name in zips if (path := fetch(where, name))))
