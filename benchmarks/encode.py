"""Items encoded per second, compared with sentence-transformers and colpali-engine.

    python data_prep/openmoji.py --out data/emoji && python -m metaembed_pl fit --config emoji
    python benchmarks/encode.py --model runs/emoji/model [--save] [--rounds 5] [--num_threads 1]

The same backbone (the quickstart's, with its weights) and the same items, mixed as in a folder of
things people have: paragraphs of this project's documentation, a few words or some hundred tokens
each, and pictures of emojis, some with a name. Each library goes from items to vectors on the CPU
as its documentation describes: `MetaEmbedder.encode_candidate`; `SentenceTransformer.encode`, which
sorts by length, with the last token's vector; colpali-engine's processor in a DataLoader, texts and
pictures by turns, with a vector of 128 for each token. Both peers prepare items by transformers'
processor, as they have it. Ours computes 16 vectors more an item than the first, and fewer than the
second. Rounds take turns, so that what else the machine does falls on all alike; by CPU time, each
library's fastest round counts. Needs sentence-transformers, and colpali-engine without what it
pulls in (pip install --no-deps colpali-engine). --save writes
benchmarks/results/encode-MACHINE.json.
"""

import argparse
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _peers import HiddenStates, colqwen_processor
from _results import machine, save
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModel

from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "data" / "emoji" / "test" / "emoji_t2i"
BATCH = 32


def mixed_items(num_texts: int, num_pictures: int, shards: Path) -> list[Item]:
    """Real items, shuffled."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    paragraphs = [p for page in pages for p in re.split(r"\n\s*\n", page.read_text())]
    # Without those that name a special token: transformers would take it for a picture.
    texts = [" ".join(p.split()) for p in paragraphs if len(p.split()) > 2 and "<|" not in p]
    generator = random.Random(0)
    items = [Item(text) for text in generator.sample(texts, min(num_texts, len(texts)))]
    pairs = ShardedPairs(shards)
    for i in generator.sample(range(len(pairs)), min(num_pictures, len(pairs))):
        pair = pairs[i]
        named = pair.query.text if i % 4 == 0 else None
        items.append(Item(named, image=pair.positive.load_image()))
    generator.shuffle(items)
    return items


def ours(model: MetaEmbedder, _: Any) -> Callable[[Sequence[Item]], Any]:
    """Meta embeddings, all of them."""
    return lambda items: model.encode_candidate(items, BATCH)


def sentence_transformers(model: MetaEmbedder, plain: Any) -> Callable[[Sequence[Item]], Any]:
    """One vector an item, the last token's."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    modules = [_Input(model, plain), Pooling(model.width, pooling_mode="lasttoken"), Normalize()]
    encoder = SentenceTransformer(modules=modules, device="cpu")

    def encode(items: Sequence[Item]) -> Any:
        given: list[Any] = [
            item.text if item.image is None else {"image": item.image, "text": item.text or ""}
            for item in items
        ]
        return encoder.encode(given, batch_size=BATCH)

    return encode


class _Input(HiddenStates):
    """Preprocesses items with transformers' processor."""

    modalities = ("text", "image", ("image", "text"))

    def __init__(self, model: MetaEmbedder, plain: Any):
        super().__init__(plain)
        ours = model.processing
        self.processor = colqwen_processor(ours.tokenizer, ours.image_processor)
        self.prompt = ours.prompt
        self.tokenizer = self.processor.tokenizer

    def preprocess(self, inputs: list[Any], **_: Any) -> dict[str, Tensor]:
        """A batch, by transformers' processor, under the turn that the model was trained with."""
        shown = "<|vision_start|><|image_pad|><|vision_end|>"
        texts, images = [], []
        for given in inputs:
            text = given if isinstance(given, str) else given["text"]
            has_image = not isinstance(given, str)
            texts.append(self.prompt.prefix + shown * has_image + text + self.prompt.suffix)
            images += [given["image"]] if has_image else []
        return dict(
            self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        )


def colpali(model: MetaEmbedder, plain: Any) -> Callable[[Sequence[Item]], Any]:
    """A vector of 128 for every token and patch."""
    processor = colqwen_processor(model.processing.tokenizer, model.processing.image_processor)
    from colpali_engine.models.qwen2_5.colqwen2_5.modeling_colqwen2_5 import (  # pyright: ignore
        ColQwen2_5,
    )

    theirs = ColQwen2_5(plain.config)
    theirs.load_state_dict(plain.state_dict(), strict=False)
    theirs.eval()

    def encode(items: Sequence[Item]) -> list[Tensor]:
        found: list[Tensor] = []
        texts = [item.text for item in items if item.image is None]
        images = [item.image for item in items if item.image is not None]
        parts = ((texts, processor.process_texts), (images, processor.process_images))
        for given, collate in parts:
            with torch.no_grad():
                for batch in DataLoader(given, BATCH, collate_fn=collate):  # pyright: ignore
                    found.extend(theirs(**batch))
        return found

    return encode


FORMS = {"ours": ours, "sentence-transformers": sentence_transformers, "colpali-engine": colpali}


def main() -> None:
    """Measure all, print a table, save it if asked to."""
    parser = argparse.ArgumentParser(description="Items encoded a second.")
    add = parser.add_argument
    add("--model", type=Path, default=Path("runs/emoji/model"))
    add("--pictures", type=Path, default=PICTURES, help="a folder of shards")
    add("--texts", type=int, default=384)
    add("--num_pictures", type=int, default=384)
    add("--rounds", type=int, default=5)
    add("--num_threads", type=int, default=torch.get_num_threads())
    add("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    model = MetaEmbedder.from_pretrained(options.model)
    plain = AutoModel.from_pretrained(options.model / "backbone").eval()
    items = mixed_items(options.texts, options.num_pictures, options.pictures)
    encoders = {name: make(model, plain) for name, make in FORMS.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in encoders}
    for number in range(options.rounds + 1):
        for name, encode in encoders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            found = encode(items)
            assert len(found) == len(items)
            if number:  # the first round warms up
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    rows = [
        {"library": name, "items_per_s": len(items) / min(each)[0], "rounds_cpu_and_wall_s": each}
        for name, each in times.items()
    ]
    name = machine("cpu")
    texts = sum(item.image is None for item in items)
    print(f"{name}, {options.num_threads} threads: {texts} texts, {len(items) - texts} pictures")
    for row in rows:
        ratio = rows[0]["items_per_s"] / row["items_per_s"]
        print(f"{row['library']:>22} {row['items_per_s']:8.1f} items/s, ours is {ratio:.2f} x")
    if options.save:
        result = {"machine": name, "num_threads": options.num_threads, "torch": torch.__version__}
        result |= {"texts": texts, "pictures": len(items) - texts, "rows": rows}
        save("encode", result)


if __name__ == "__main__":
    main()
