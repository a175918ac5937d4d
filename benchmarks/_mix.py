"""Synthetic data shaped like the 27 sources of the paper's mix: blank pictures and random words.

Their sizes and lengths follow the papers of the datasets, as far as these report them.

Each picture size is drawn and decoded only once: lengths are counted, contents do not matter.
"""

import random
from dataclasses import dataclass
from typing import Any

from PIL import Image

from metaembed_pl.item import Item, Pair

Size = tuple[int, int]
PHOTO = ((640, 480), (480, 640), (640, 427), (500, 375))
PAGE = ((1700, 2200), (1654, 2339), (1275, 1650))
SLIDE = ((1280, 720), (1024, 768), (1500, 844))
CHART = ((850, 600), (800, 557), (310, 347))
NEWS = ((1024, 683), (768, 512), (600, 800))


@dataclass(frozen=True)
class ItemSizes:
    """The sizes of a source's queries, or of its candidates.

    Args:
        tokens: median number of a text's tokens; 0: no text.
        sizes: of the pictures, one of which is drawn; empty: no pictures.
        spread: standard deviation of the logarithm of a text's length.
    """

    tokens: int
    sizes: tuple[Size, ...] = ()
    spread: float = 0.4


@dataclass(frozen=True)
class MixSource:
    """A source of the mix: its name, the number of its pairs and the sizes of their items."""

    name: str
    num_pairs: int
    query: ItemSizes
    candidate: ItemSizes


CAPTION, QUESTION, LABEL = ItemSizes(14), ItemSizes(28, spread=0.3), ItemSizes(3, spread=0.5)
SEE = 14  # tokens of an instruction to represent a picture


def _seen(sizes: tuple[Size, ...], tokens: int = SEE) -> ItemSizes:
    return ItemSizes(tokens, sizes, 0.2)


SOURCES = (
    MixSource("ImageNet_1K", 100_000, _seen(PHOTO), LABEL),
    MixSource("N24News", 48_988, ItemSizes(60, NEWS, 0.6), LABEL),
    MixSource("HatefulMemes", 8_500, _seen(((550, 800), (800, 600))), LABEL),
    MixSource("VOC2007", 7_844, _seen(((500, 375),)), LABEL),
    MixSource("SUN397", 19_850, _seen(((1024, 768), (500, 375), (640, 480))), LABEL),
    MixSource("OK-VQA", 9_009, ItemSizes(26, PHOTO), LABEL),
    MixSource("A-OKVQA", 17_056, ItemSizes(28, PHOTO), LABEL),
    MixSource("DocVQA", 39_463, ItemSizes(28, PAGE), LABEL),
    MixSource(
        "InfographicsVQA", 23_946, ItemSizes(32, ((1000, 2500), (800, 3200), (1200, 1800))), LABEL
    ),
    MixSource("ChartQA", 28_299, ItemSizes(30, CHART), LABEL),
    MixSource("Visual7W", 69_817, ItemSizes(24, PHOTO), LABEL),
    MixSource("VisDial", 123_287, ItemSizes(130, spread=0.3), _seen(PHOTO)),
    MixSource(
        "CIRR", 26_116, ItemSizes(30, ((1000, 700), (640, 480))), _seen(((1000, 700), (640, 480)))
    ),
    MixSource("VisualNews_t2i", 99_903, ItemSizes(36), _seen(NEWS)),
    MixSource("VisualNews_i2t", 100_000, _seen(NEWS), ItemSizes(26)),
    MixSource("MSCOCO_t2i", 100_000, ItemSizes(24), _seen(PHOTO)),
    MixSource("MSCOCO_i2t", 113_287, _seen(PHOTO), CAPTION),
    MixSource("NIGHTS", 15_941, _seen(((512, 512),)), _seen(((512, 512),))),
    MixSource("WebQA", 17_166, QUESTION, ItemSizes(30, ((800, 600), (1024, 768)))),
    MixSource("MSCOCO", 100_000, ItemSizes(24, PHOTO), _seen(((120, 160), (224, 224), (300, 200)))),
    MixSource("arxivqa", 100_000, QUESTION, _seen(((1000, 750), (700, 550)))),
    MixSource("tat_dqa", 13_251, QUESTION, _seen(PAGE)),
    MixSource("infoseek_it2it", 100_000, ItemSizes(28, PHOTO), ItemSizes(130, NEWS, 0.3)),
    MixSource("infoseek_it2t", 100_000, ItemSizes(28, PHOTO), ItemSizes(130, spread=0.3)),
    MixSource("colpali_train", 118_695, QUESTION, _seen(PAGE)),
    MixSource("visrag_ind", 122_752, QUESTION, _seen((*PAGE, *SLIDE))),
    MixSource("visrag_syn", 239_358, QUESTION, _seen((*PAGE, *SLIDE))),
)


class MadePairs(list):
    """Synthetic pairs of a source, with the interface of `ShardedPairs`."""

    def __init__(self, source: MixSource, count: int):
        chance = random.Random(source.name)
        super().__init__(_pair(source, i, chance) for i in range(count))
        self.name = self.folder = source.name
        self.shard_sizes = [count]

    def read(self, index: int, *_: Any) -> Pair:
        """A pair, which has no more hard negatives than it needs."""
        return self[index]

    def locate(self, index: int) -> tuple[str, str]:
        """Shard and key of a pair."""
        return "made", str(index)


def _pair(source: MixSource, number: int, chance: random.Random) -> Pair:
    items = [_item(kind, chance) for kind in (source.query, source.candidate, source.candidate)]
    return Pair(f"{source.name}-{number}", items[0], items[1], (items[2],))


_BLANK: dict[Size, Image.Image] = {}


def _item(kind: ItemSizes, chance: random.Random) -> Item:
    count = round(kind.tokens * chance.lognormvariate(0, kind.spread))
    # Four characters are a token to `RoughTokenizer`.
    words = " ".join(f"{chance.randrange(1000):03}" for _ in range(max(1, count)))
    picture = None
    if kind.sizes:
        size = chance.choice(kind.sizes)
        if size not in _BLANK:
            _BLANK[size] = Image.new("RGB", size, "gray")
        picture = _BLANK[size]
    made = Item(words, picture)
    made.__dict__["content"] = f"{words} {picture and picture.size}"  # else every pixel is hashed
    return made
