"""The cost of the paper's recipes at their real size, counted on a CPU without weights.

    python benchmarks/real_shapes.py                           # all recipes: a quarter of an hour
    python benchmarks/real_shapes.py --recipes qwen3b          # one: a minute or two
    python benchmarks/real_shapes.py --save                    # also as benchmarks/results/*.json

docs/scale.md explains the columns. FLOPs are counted operation by operation at a few shapes of the
real model; for other shapes they follow from tokens and patches. A second line has the parts of a
GPU's memory, counted / by `check`, and:

fit error          of the FLOPs, at a shape that they were not fitted to
waited             FLOPs if all ranks had as many as the slowest one, over those that they have
busy               real tokens over those that all ranks could have computed meanwhile
least real tokens  the source with the smallest share of real tokens

Batches are as training makes them, for eight ranks, from synthetic data (_mix.py): blank pictures
and words, with about the sizes and lengths of the mix's 27 sources.
"""

import argparse
import time
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import _weightless as weightless
import torch
from _mix import SOURCES, MadePairs, MixSource
from _results import machine, save
from _shapes import RandomTokenizer, pieces
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModel

from metaembed_pl.cli.check import _running
from metaembed_pl.cli.check_data import measure
from metaembed_pl.cli.recipe_faults import Recipe, read_recipe
from metaembed_pl.cli.recipe_path import find_recipe, recipe_folder
from metaembed_pl.data.batches import TrainingBatches
from metaembed_pl.data.plan import Plan, PlannedSource
from metaembed_pl.item import Item
from metaembed_pl.model.backbone import set_up
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.family import family_of
from metaembed_pl.model.image_processors import load_image_processor
from metaembed_pl.model.processing import Processing
from metaembed_pl.training.flops import _patch_pairs
from metaembed_pl.training.memory import GIB, Step, estimate

RECIPES = ("qwen3b", "qwen7b", "qwen32b", "llama11b", "paligemma3b", "qwen3vl8b")
SHORT = 100  # tokens of a text that is counted
PICTURE = Image.new("RGB", (2048, 2048), "gray")  # above the limits of all recipes


class SizesOnly:
    """The model's own image processor, run once for each size, with pixels on the meta device."""

    def __init__(self, real: Any):
        self._real = real
        self._seen: dict[Any, dict[str, Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, images: list[list[Image.Image]], **options: Any) -> dict[str, Tensor]:
        """The tensors of all pictures."""
        parts = [self._one(image, options) for row in images for image in row]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _one(self, image: Image.Image, options: dict[str, Any]) -> dict[str, Tensor]:
        key = image.size, repr(sorted(options.items()))
        if key not in self._seen:
            found = self._real(images=[[image]], **options)
            self._seen[key] = {
                name: t.to("meta") if t.is_floating_point() else t
                for name, t in found.items()
                if isinstance(t, Tensor)
            }
        return self._seen[key]


def build(recipe: Recipe) -> MetaEmbedder:
    """The model that a recipe trains, on the meta device."""
    module = recipe.model
    assert module is not None
    backbone = module.backbone_config
    folder = recipe_folder() / "configs" / str(backbone.path)
    config: Any = AutoConfig.from_pretrained(folder)
    family = family_of(config.model_type)
    with torch.device("meta"):
        model = AutoModel.from_config(
            config, dtype=getattr(torch, backbone.dtype), attn_implementation="sdpa"
        ).train()
        set_up(model, backbone, family)
    image_processor = load_image_processor(str(folder))
    family.set_up(image_processor, config.to_dict(), backbone.min_pixels, backbone.max_pixels)
    marks = {family.image_token: _image_id(config)}
    processing = Processing(
        family,
        RandomTokenizer(config.get_text_config().vocab_size, marks),
        SizesOnly(image_processor),
        module.prompt,
        backbone.max_text_tokens,
    )
    with torch.device("meta"):
        return module.assemble(model, processing)


@dataclass
class Trainee:
    """A recipe's model without weights, and the way it is run, as `check` sees it."""

    recipe: Recipe
    model: MetaEmbedder
    running: Any

    @classmethod
    def of(cls, name: str) -> "Trainee":
        """The trainee of a built-in recipe."""
        recipe = read_recipe(Path(find_recipe(name)))
        model = build(recipe)
        running = _running(recipe, recipe.config.trainer.devices, on_gpu=True)
        if running.stage or "true" in running.precision:
            model.to(torch.bfloat16)  # DeepSpeed trains a bf16 copy and no autocast is needed
        if hasattr(model, "shared"):  # what ranks wait for
            model.shared = "weights" if running.stage == 3 else "gradients"
        weightless.without_weights(model)
        smallest = model.processing.smallest_picture
        model.processing.__dict__["smallest_picture"] = {
            name: weightless.fake(part) if part.is_floating_point() else part
            for name, part in smallest.items()
        }
        return cls(recipe, model, running)

    def count(self, calls: list[tuple[Any, Any]]) -> weightless.Counted:
        """The cost of a forward and a backward pass as training runs them."""
        mixed = "mixed" in self.running.precision and not self.running.stage
        return weightless.count(self.model, calls, autocast=mixed)

    def count_least(self, calls: list[tuple[Any, Any]]) -> weightless.Counted:
        """The cost without anything that training does not need."""
        family, backbone = self.model.processing.family, self.model.backbone
        frozen = [
            backbone.get_submodule(name)
            for name in (family.vision_module, family.projector_module)
            if name and not any(p.requires_grad for p in backbone.get_submodule(name).parameters())
        ]
        plain = [(module, module.forward) for module in frozen]
        for module, forward in plain:
            vars(module)["forward"] = torch.no_grad()(forward)
        was = [m for m in backbone.modules() if getattr(m, "gradient_checkpointing", False)]
        for module in was:
            vars(module)["gradient_checkpointing"] = False
        try:
            return self.count(calls)
        finally:
            for module in was:
                vars(module)["gradient_checkpointing"] = True
            for module, _ in plain:
                del module.forward


@dataclass(frozen=True)
class Work:
    """The counts that the operations of a forward call are linear in.

    Args:
        tokens: of all rows, padding included.
        pairs: pairs of tokens of a row.
        patches: of all pictures; the number of pictures if all have the same size.
        patch_pairs: pairs of patches of a picture that attend to each other, over all layers.
        looking: rows of a call with a picture: cross-attention runs for all of them.
        looking_tokens: their tokens.
    """

    tokens: float = 0
    pairs: float = 0
    patches: float = 0
    patch_pairs: float = 0
    looking: float = 0
    looking_tokens: float = 0

    @classmethod
    def of(cls, config: Any, rows: int, length: int, patches: list[int]) -> "Work":
        """The work of a call."""
        if hasattr(config.vision_config, "spatial_merge_size"):
            return cls(
                rows * length,
                rows * length**2,
                sum(patches),
                sum(_patch_pairs(config.vision_config, n) for n in patches),
            )
        looks = bool(patches) * ("mllama" in config.model_type)
        count = len(patches)
        return cls(
            rows * length, rows * length**2, count, count, rows * looks, rows * length * looks
        )


def num_patches(inputs: dict[str, Tensor]) -> list[int]:
    """Patches of each picture of a call; 1 each if all have the same size."""
    if "image_grid_thw" in inputs:
        return inputs["image_grid_thw"].prod(dim=1).tolist()
    return [1] * len(inputs["pixel_values"]) if "pixel_values" in inputs else []


class Cost:
    """Operations of any call, fitted to counts of some calls.

    Args:
        counts: (work, operations but attention's, attention's).
    """

    def __init__(self, counts: list[tuple[Work, float, float]]):
        works, plain, attention = zip(*counts, strict=True)
        rows = [(w.tokens, w.patches, w.looking, w.looking_tokens) for w in works]
        self._plain = _solved(rows, plain)
        rows = [(w.pairs, w.patch_pairs, w.looking_tokens) for w in works]
        self._attention = _solved(rows, attention)

    def __call__(self, w: Work) -> float:
        """Operations of a call."""
        plain = (w.tokens, w.patches, w.looking, w.looking_tokens)
        attention = (w.pairs, w.patch_pairs, w.looking_tokens)
        return _product(plain, self._plain) + _product(attention, self._attention)


def _solved(rows: Any, counts: Any) -> list[float]:
    table = torch.tensor(rows, dtype=torch.float64)
    scale = table.abs().amax(dim=0).clamp(min=1)
    right = torch.tensor(counts, dtype=torch.float64)[:, None]
    return (
        torch.linalg.lstsq(table / scale, right, driver="gelsd").solution[:, 0] / scale
    ).tolist()


def _product(left: Any, right: Any) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def text_of(num_tokens: int) -> str:
    """A text with so many tokens by `RoughTokenizer`."""
    return " app" * num_tokens


@dataclass
class Costs:
    """The counts of a recipe's model.

    Args:
        flops: of a call as training runs it.
        once: of the vision tower's forward pass.
        forward: of the rest of the forward pass, at least.
        backward: of the backward pass, at least.
        fit_error: of `flops`, at calls that it was not fitted to.
        kept: bytes of a picture and of a text, at the limits.
        step: a query and two candidates, all at the limits but one a token shorter.
    """

    flops: Cost
    once: Cost
    forward: Cost
    backward: Cost
    fit_error: float
    kept: dict[str, dict[str, int]]
    step: weightless.Counted


def costs(trainee: Trainee) -> Costs:
    """Count a recipe's model at some shapes."""
    model = trainee.model
    config: Any = model.backbone.config
    process, limit = model.processor(), model.processing.max_text_tokens

    def call(*items: Item) -> tuple[dict[str, Tensor], Work]:
        inputs = process(items, "query")
        return inputs, _work(config, inputs)

    calls = {"text": call(Item(text_of(limit))), "picture": call(Item("a", PICTURE))}
    if "mllama" in config.model_type:
        calls["both"] = call(Item(text_of(limit), PICTURE))
        calls["mixed"] = call(Item("a", PICTURE), Item(text_of(SHORT)))
    counted = {name: trainee.count([(inputs, "query")]) for name, (inputs, _) in calls.items()}
    flops, vision, forward, backward = [], [], [], []
    for name, (inputs, work) in calls.items():
        found = counted[name]
        flops.append((work, found.flops - found.attention, found.attention))
        seen = replace(work, tokens=0, pairs=0, looking=0, looking_tokens=0)
        vision.append((seen, found.vision - found.seen, found.seen))
        if name == "text" or len(calls) > 2:
            least, read = (
                trainee.count_least([(inputs, "query")]),
                replace(work, patches=0, patch_pairs=0),
            )
            attention = least.attention - least.seen
            forwards, backwards = attention * FORWARD_SHARE, attention * (1 - FORWARD_SHARE)
            forward.append((read, least.forward - least.vision - forwards, forwards))
            backward.append((read, least.backward - backwards, backwards))
    cost, step = Cost(flops), _step_calls(trainee)
    found = trainee.count(step)
    expected = sum(cost(_work(config, inputs)) for inputs, _ in step)
    return Costs(
        cost,
        Cost(vision),
        Cost(forward),
        Cost(backward),
        expected / found.flops - 1,
        {name: counted[name].kept for name in ("picture", "text")},
        found,
    )


# A fused kernel makes two products forwards and five backwards.
FORWARD_SHARE = 2 / 7


def _step_calls(trainee: Trainee) -> list[tuple[dict[str, Tensor], Any]]:
    text = text_of(trainee.model.processing.max_text_tokens)
    process = trainee.model.processor()
    shorter, longest = Item(text[:-4], PICTURE), Item(text, PICTURE)
    return [
        (process([longest], "query"), "query"),
        (process([longest, shorter], "candidate"), "candidate"),
    ]


def rows_of(config: Any, inputs: dict[str, Tensor]) -> list[Work]:
    """The work of each item of a call, as if it were encoded by itself without padding."""
    lengths = inputs["attention_mask"].sum(dim=1).tolist()[: len(inputs["slot_index"])]
    patches = num_patches(inputs)
    with_image = _with_image(config, inputs)
    return [
        Work.of(config, 1, length, [patches[with_image.index(i)]] if i in with_image else [])
        for i, length in enumerate(lengths)
    ]


def _with_image(config: Any, inputs: dict[str, Tensor]) -> list[int]:
    """The rows that show a picture, in the order of the pictures."""
    if "image_rows" in inputs:
        return inputs["image_rows"].tolist()
    if "pixel_values" not in inputs:
        return []
    shows = (inputs["input_ids"] == _image_id(config)).any(dim=1)
    return shows.nonzero()[:, 0].tolist()


def _image_id(config: Any) -> int:
    return getattr(config, "image_token_id", None) or config.image_token_index


def rank_batches(trainee: Trainee, source: MixSource) -> list[Any]:
    """The batch of each rank, of one global batch of a source."""
    data, module = trainee.recipe.data, trainee.recipe.model
    assert data is not None
    assert module is not None
    pairs = MadePairs(source, data.global_batch_size)
    plan = Plan([PlannedSource(source.name, (len(pairs),))], data.global_batch_size)
    made = TrainingBatches([pairs], [data.num_negatives], plan, trainee.model.processor())  # pyright: ignore[reportArgumentType]
    made.in_chunks, made.max_chunk_tokens = True, module.max_chunk_tokens
    made.num_ranks = trainee.running.num_gpus
    found = []
    with mock.patch("metaembed_pl.data.batches.decoded", lambda pair: pair):
        for rank in range(made.num_ranks):
            made.rank = rank
            found.append(made.load(0))
    return found


def in_step(calls: list[list[Any]], nothing: Any) -> list[list[Any]]:
    """Equally many calls on each rank, as with sharded weights."""
    most = max(map(len, calls))
    return [[*of_rank, *[nothing] * (most - len(of_rank))] for of_rank in calls]


def of_source(trainee: Trainee, cost: Costs, source: MixSource) -> dict[str, float]:
    """A pair of a source: operations, the least of them, and shares of tokens."""
    config: Any = trainee.model.backbone.config
    running = trainee.running
    batches = rank_batches(trainee, source)
    needed = [[pieces(batch.queries), pieces(batch.candidates)] for batch in batches]
    by_side = [list(of_ranks) for of_ranks in zip(*needed, strict=True)]
    if running.stage == 3:
        nothing = map(trainee.model.processor().smallest_row, ("query", "candidate"))
        by_side = [in_step(side, row) for side, row in zip(by_side, nothing, strict=True)]
    run = [list(chain(*of_rank)) for of_rank in zip(*by_side, strict=True)]
    flops = [sum(cost.flops(_work(config, call)) for call in calls) for calls in run]
    tokens = [sum(call["input_ids"].numel() for call in calls) for calls in run]
    calls = [call for of_rank in needed for side in of_rank for call in side]
    rows = [row for call in calls for row in rows_of(config, call)]
    real = sum(int(c["attention_mask"][: len(c["slot_index"])].sum()) for c in calls)
    redone = sum(map(cost.forward, rows)) if running.is_checkpointed else 0.0
    pairs = sum(len(batch.keys) for batch in batches)
    return {
        "flops": sum(flops) / pairs,
        "least": sum(cost.once(r) + cost.forward(r) + cost.backward(r) for r in rows) / pairs,
        "redone": redone / pairs,
        "waited": running.num_gpus * max(flops) / pairs,
        "tokens": sum(tokens) / pairs,
        "real": real / sum(tokens),
        "busy": real / (running.num_gpus * max(tokens)),
    }


def _work(config: Any, inputs: dict[str, Tensor]) -> Work:
    rows, length = inputs["input_ids"].shape
    return Work.of(config, rows, length, num_patches(inputs))


def of_mix(trainee: Trainee, cost: Costs) -> dict[str, Any]:
    """A pair of the mix, sources weighed by their pairs."""
    found = {source.name: of_source(trainee, cost, source) for source in SOURCES}
    weights = {source.name: source.num_pairs for source in SOURCES}
    mean = {
        key: sum(weights[name] * each[key] for name, each in found.items()) / sum(weights.values())
        for key in ("flops", "least", "redone", "waited", "tokens")
    }
    tokens = {name: weights[name] * each["tokens"] for name, each in found.items()}
    real = sum(tokens[name] * each["real"] for name, each in found.items())
    waited = sum(tokens[name] * each["real"] / each["busy"] for name, each in found.items())
    mean |= {"real": real / sum(tokens.values()), "busy": real / waited}
    mean["ratio"] = mean["flops"] / (mean["least"] + mean["redone"])
    worst = min(found, key=lambda name: found[name]["real"])
    return {**mean, "worst_source": worst, "worst_real": found[worst]["real"], "sources": found}


def memory(trainee: Trainee, counted: weightless.Counted) -> dict[str, dict[str, float]]:
    """The peak of a step whose rows are as long as the limits allow: counted, and by `check`."""
    recipe, model, running = trainee.recipe, trainee.model, trainee.running
    data = recipe.data
    assert data is not None
    num_pairs = data.global_batch_size // running.num_gpus
    trained = [p for p in model.parameters() if p.requires_grad]
    lengths = measure(model, [])
    step = Step(
        num_pairs, data.num_negatives, lengths.longest["query"], lengths.longest["candidate"]
    )
    estimated = asdict(estimate(model, step, running))
    alone = asdict(estimate(model, step, replace(running, num_gpus=1, strategy="auto")))
    kept = {part: num_pairs * size for part, size in counted.kept.items()}
    peak = {part: num_pairs * size for part, size in counted.peak.items()}
    return {
        "counted": {
            "weights": _bytes(model.parameters()),
            "gradients": _bytes(trained),
            "kept": sum(kept.values()),
            "activations": sum(peak.values()),
            "loss": loss_bytes(trainee),
        },
        "peak_by_part": peak,
        "kept_by_part": kept,
        "check": estimated,
        "check_alone": estimated | {part: alone[part] for part in ("weights", "gradients")},
    }


def loss_bytes(trainee: Trainee) -> int:
    """The peak of a rank's loss: meta embeddings of all ranks, their gradients, and the scores."""
    recipe, model = trainee.recipe, trainee.model
    module, data = recipe.model, recipe.data
    assert module is not None
    assert data is not None
    own, (r_q, r_c, _) = data.global_batch_size // trainee.running.num_gpus, model.groups[-1]

    def vectors(rows: int, of_each: int) -> Tensor:
        return torch.zeros(rows, of_each, model.width, requires_grad=True)

    ledger = weightless.Ledger([])
    with ledger:
        queries, gathered = vectors(own, r_q), vectors(data.global_batch_size, r_c)
        candidates = vectors(own, r_c)  # a copy of these was gathered
        candidates.grad = torch.zeros_like(candidates)
        negatives = vectors(own * data.num_negatives, r_c)
        ledger.add([queries, gathered, candidates, candidates.grad, negatives])
        rows = torch.arange(own * data.num_negatives).view(own, -1)
        found = module.loss(
            queries, gathered, negatives, positive_of=torch.arange(own), negatives_of=rows
        )
        found.loss.backward()
    return sum(ledger.peak.values())


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def of_recipe(name: str) -> dict[str, Any]:
    """All counts of a recipe."""
    start = time.perf_counter()
    trainee = Trainee.of(name)
    cost = costs(trainee)
    return {
        **of_mix(trainee, cost),
        "kept": cost.kept,
        "fit_error": cost.fit_error,
        "memory": memory(trainee, cost.step),
        "counted_in_s": time.perf_counter() - start,
    }


PARTS = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "activations": ("activations",),
    "loss": ("gathered", "loss"),
}


HEAD = (
    "| recipe | TFLOP a pair | least | redone | ratio | real | GiB a picture | a text | peak "
    "| `check` |\n|---|---|---|---|---|---|---|---|---|---|"
)


def table_row(recipe: str, row: dict[str, Any]) -> str:
    """A line of the table: TFLOPs of a pair, GiB of one row and of a step's activations."""
    tera = [f"{row[key] / 1e12:.1f}" for key in ("flops", "least", "redone")]
    kept = [f"{sum(row['kept'][key].values()) / GIB:.2f}" for key in ("picture", "text")]
    memory = row["memory"]
    peaks = [f"{memory[by]['activations'] / GIB:.1f}" for by in ("counted", "check")]
    cells = [*tera, f"{row['ratio']:.2f}", f"{row['real']:.0%}", *kept, *peaks]
    return f"| {recipe} | {' | '.join(cells)} |"


def details(recipe: str, row: dict[str, Any]) -> str:
    """A GPU's memory in GiB, counted / as `check` estimates it, and what else was counted.

    `check` counts gradients twice under DDP, for its buckets, which are not visible here. For
    strategies that shard, both numbers are those before sharding.
    """
    counted, estimated = row["memory"]["counted"], row["memory"]["check_alone"]
    found = []
    for part, of_check in PARTS.items():
        both = counted[part] / GIB, sum(estimated[each] for each in of_check) / GIB
        found.append(f"{part} {both[0]:.2f} / {both[1]:.2f} ({both[1] / both[0] - 1:+.0%})")
    return (
        f"{recipe}: {', '.join(found)}; fit error {row['fit_error']:.1%}; waited "
        f"{row['waited'] / row['flops']:.2f}; busy {row['busy']:.0%}; least real tokens: "
        f"{row['worst_source']} {row['worst_real']:.0%}"
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Count, print a line for each recipe, and save if requested."""
    parser = argparse.ArgumentParser(description="What the recipes cost at their real size.")
    add = parser.add_argument
    add("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    add("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args(arguments)
    print(HEAD)
    found = {}
    for name in options.recipes:
        found[name] = of_recipe(name)
        print(table_row(name, found[name]))
        print(f"\n{details(name, found[name])}\n", flush=True)
    if options.save:
        save("real-shapes", {"machine": machine(), "recipes": found})
    return found


if __name__ == "__main__":
    main()
