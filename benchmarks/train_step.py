"""A training step on a CPU, compared with sentence-transformers and colpali-engine: CPU seconds.

    python benchmarks/train_step.py [--save] [--steps 9]      # a minute or two, one thread

The quickstart's model (a Qwen2.5-VL of 1.7 M parameters, all of it trained) takes steps on 128
pairs: a name of a few words -> a picture of 84 x 84, nine image tokens. A step is all of it: read
and decode the pairs, preprocess, forward, loss, backward, clip, AdamW. Each form has its library's
own classes for it, with the prompts that it has by default:

metaembed_pl           shards, 8 query and 16 candidate meta tokens (groups to 8x16), MMR loss; the
                       quickstart's precision: bf16 under autocast, attention in fp32
sentence-transformers  its Transformer, Pooling (one vector an item) and
                       MultipleNegativesRankingLoss
colpali-engine         ColQwen2.5 with its processor, collator and ColbertPairwiseCELoss

(pip install sentence-transformers; pip install --no-deps colpali-engine.) Both peers run in fp32
and in bf16 under autocast; the faster one counts. Steps of all forms take turns in one process, so
that whatever else runs on the machine slows them alike; CPU time, median over the steps.
--save writes benchmarks/results/train-step-MACHINE.json.
"""

import argparse
import io
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from _peers import colqwen_processor, processor_of, without_torchvision
from _results import machine, save
from loading import picture
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, Qwen2_5_VLProcessor

from metaembed_pl.data.batches import TrainingBatches
from metaembed_pl.data.collate import TrainBatch
from metaembed_pl.data.plan import Plan, PlannedSource
from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.item import Item, Pair
from metaembed_pl.model.backbone import (
    BackboneConfig,
    ScratchTokenizer,
    build_backbone,
    build_processing,
    scratch_config,
)
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.processing import Prompt
from metaembed_pl.training.loss import MMRLoss

BACKBONE = Path(__file__).parents[1] / "recipes" / "backbones" / "tiny_qwen25vl.yaml"
GROUPS = ["1x1", "2x4", "4x8", "8x16"]
NUM_PAIRS = 128
PEERS = ("sentence-transformers", "colpali-engine")
PARTS = ("data", "forward", "backward", "optimizer")
# What the hub's models of this family have, without the system's turn.
CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
    "{% for part in turn.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
PROMPT = Prompt(query="", image_only="")  # the same turn without words
Names = list[tuple[str, bytes]]


class Form:
    """One library's way to take a step.

    Args:
        model: what is trained.
        batch: gives the next batch, from what is on the disk or in memory to tensors.
        loss: of a batch.
        dtype: that autocast computes in; None: fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Callable[[int], Any],
        loss: Callable[[Any], Tensor],
        dtype: torch.dtype | None,
    ):
        self.model, self.batch, self.loss, self.dtype = model.train(), batch, loss, dtype
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.steps: list[dict[str, float]] = []

    def step(self, number: int) -> None:
        """Takes a step and notes the CPU time of its parts."""
        times = [time.process_time()]
        batch = self.batch(number)
        times.append(time.process_time())
        self.optimizer.zero_grad()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            loss = self.loss(batch)
        times.append(time.process_time())
        loss.backward()
        times.append(time.process_time())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        times.append(time.process_time())
        taken = (end - start for start, end in itertools.pairwise(times))
        self.steps.append(dict(zip(PARTS, taken, strict=True)))

    def row(self) -> dict[str, Any]:
        """Medians over the steps."""
        parts = {name: statistics.median(step[name] for step in self.steps) for name in PARTS}
        return {"cpu_s": statistics.median(sum(step.values()) for step in self.steps), **parts}


def write_pairs(folder: Path) -> Names:
    """The pairs as shards, and what they hold."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(300)]
    found = []
    with ShardWriter(folder / "prompts", "prompts") as writer:  # the tokenizer knows their words
        for number in range(20):
            writer.write(Pair(str(number), Item("user Query: Describe the image."), Item("user")))
    with ShardWriter(folder / "names", "names") as writer:
        for number in range(NUM_PAIRS):
            name, image = " ".join(draw.choices(words, k=draw.randint(1, 4))), small(number)
            writer.write(Pair(str(number), Item(name), Item(image=image)))
            found.append((name, image))
    return found


def small(number: int) -> bytes:
    """A part of a photograph as a PNG of 84 x 84."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture((84, 84), number))).save(buffer, "PNG")
    return buffer.getvalue()


def backbone_config(folder: Path) -> BackboneConfig:
    """The quickstart's."""
    values = yaml.safe_load(BACKBONE.read_text())
    tokenizer = ScratchTokenizer(2048, [str(folder / "names"), str(folder / "prompts")])
    return BackboneConfig(**values | {"tokenizer": tokenizer})


def ours(folder: Path, _names: Names, dtype: torch.dtype | None) -> Form:
    """As `fit` takes a step."""
    config = backbone_config(folder)
    processing = build_processing(config, PROMPT)
    model = MetaEmbedder(build_backbone(config, processing), processing, GROUPS, "own")
    pairs = ShardedPairs(folder / "names")
    plan = Plan([PlannedSource("names", tuple(pairs.shard_sizes))], NUM_PAIRS)
    batches = TrainingBatches([pairs], [0], plan, model.processor())
    loss_of = MMRLoss(model.groups)

    def loss(batch: TrainBatch) -> Tensor:
        queries = model(batch.queries, "query")
        candidates = model(batch.candidates, "candidate")
        return loss_of(queries, **batch.loss_inputs(candidates)).loss

    return Form(model, batches.load, loss, dtype)


def plain(folder: Path, kind: Any = AutoModel.from_config) -> tuple[nn.Module, Any, Any]:
    """The same backbone as transformers has it, its tokenizer and our image processor."""
    values = yaml.safe_load(BACKBONE.read_text())
    processing = build_processing(backbone_config(folder), PROMPT)
    model = kind(scratch_config(values["scratch"], processing))
    return model, processing.tokenizer, processing.image_processor


def sentence_transformers(folder: Path, names: Names, dtype: torch.dtype | None) -> Form:
    """One vector an item, the last token's."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import transformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    backbone, *parts = plain(folder)
    processor = processor_of(Qwen2_5_VLProcessor, *parts, chat_template=CHAT)

    class Prepared:
        @staticmethod
        def from_pretrained(*_args: Any, **_kwargs: Any) -> Any:
            return processor

    with tempfile.TemporaryDirectory() as saved:
        backbone.save_pretrained(saved)  # pyright: ignore[reportCallIssue]
        transformer.AutoProcessor = Prepared  # pyright: ignore
        read = Transformer(saved)
    width = read.config.get_text_config().hidden_size
    modules = [read, Pooling(width, pooling_mode="lasttoken"), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    loss_of = MultipleNegativesRankingLoss(model)

    def batch(_number: int) -> Any:
        texts, pictures = [name for name, _ in names], [decoded(image) for _, image in names]
        return [model.preprocess(texts), model.preprocess(pictures)]

    return Form(model, batch, lambda rows: loss_of(rows, None), dtype)


def decoded(image: bytes) -> Image.Image:
    """The picture, as a dataset of the `datasets` library gives it."""
    opened = Image.open(io.BytesIO(image))
    opened.load()
    return opened


def colpali_engine(folder: Path, names: Names, dtype: torch.dtype | None) -> Form:
    """A vector of 128 for every token and patch."""
    without_torchvision()
    from colpali_engine.collators.visual_retriever_collator import (  # pyright: ignore
        VisualRetrieverCollator,
    )
    from colpali_engine.loss import ColbertPairwiseCELoss  # pyright: ignore
    from colpali_engine.models.qwen2_5.colqwen2_5.modeling_colqwen2_5 import (  # pyright: ignore
        ColQwen2_5,
    )

    model, *parts = plain(folder, ColQwen2_5)
    collate = VisualRetrieverCollator(colqwen_processor(*parts))
    loss_of = ColbertPairwiseCELoss()

    def batch(_number: int) -> Any:
        return collate([{"query": name, "pos_target": decoded(image)} for name, image in names])

    def side(rows: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in rows.items() if k.startswith(prefix)}

    def loss(rows: dict[str, Tensor]) -> Tensor:
        queries, candidates = model(**side(rows, "query_")), model(**side(rows, "doc_"))
        return loss_of(queries, candidates)

    return Form(model, batch, loss, dtype)


FORMS = {
    "metaembed_pl": ours,
    "sentence-transformers": sentence_transformers,
    "colpali-engine": colpali_engine,
}


def measure(num_steps: int, forms: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each library, the faster of its precisions."""
    with tempfile.TemporaryDirectory() as folder:
        names = write_pairs(Path(folder))
        made: dict[tuple[str, torch.dtype | None], Form] = {}
        for name in forms:
            for dtype in (torch.bfloat16, None)[: 1 if name == "metaembed_pl" else 2]:
                torch.manual_seed(0)
                made[name, dtype] = FORMS[name](Path(folder), names, dtype)
        for number in range(num_steps + 1):
            for form in made.values():
                form.step(number)
                if number == 0:
                    form.steps.clear()
    rows: dict[str, dict[str, Any]] = {}
    for (name, dtype), form in made.items():
        row = {"what": name, "precision": "bf16" if dtype else "fp32", **form.row()}
        if name not in rows or row["cpu_s"] < rows[name]["cpu_s"]:
            rows[name] = row
    first = next(iter(rows.values()))
    return [row | {"ratio": row["cpu_s"] / first["cpu_s"]} for row in rows.values()]


def main() -> None:
    """Measure all forms, print a table, save it if asked to."""
    parser = argparse.ArgumentParser(description="A training step against the peers'.")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--steps", type=int, default=9, help="of each form (9)")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = machine("cpu")
    print(f"{name}, one thread, torch {torch.__version__}; CPU-seconds of {NUM_PAIRS} pairs")
    rows = measure(options.steps, tuple(options.forms))
    line = "{:>22} {:>9} " + " {:>9}" * len(PARTS) + " {:>7} {:>6}"
    print(line.format("", "precision", *PARTS, "step", "ratio"))
    for row in rows:
        parts = (f"{row[part]:.3f}" for part in PARTS)
        step, ratio = f"{row['cpu_s']:.3f}", f"{row['ratio']:.2f}"
        print(line.format(row["what"], row["precision"], *parts, step, ratio))
    if options.save:
        result = {"machine": name, "num_threads": 1, "torch": torch.__version__}
        save("train-step", {**result, "pairs": NUM_PAIRS, "rows": rows})


if __name__ == "__main__":
    main()
