"""The cost of the paper's recipes at their real size, counted on a CPU without weights.

    python benchmarks/real_shapes.py                           # all recipes: a quarter of an hour
    python benchmarks/real_shapes.py --recipes qwen3b          # one: a minute or two
    python benchmarks/real_shapes.py --save after              # to results/real-shapes-after.json
    python benchmarks/real_shapes.py --table before after      # two saved ones as a table

FLOPs      of forward and backward pass, counted operation by operation at a few shapes of the real
           model; in between they follow from tokens and patches, which a shape that was not fitted
           checks (`fit error`)
least      the tower once, two or three passes through what needs gradients, real tokens alone
redone     what gradient checkpointing computes again of it: needed as well
ratio      FLOPs over the two
kept       bytes between forward and backward of one row as long as the limits allow
peak       of a step whose rows are all that long, beside what `check` estimates; the second line of
           a recipe has the parts of a GPU's memory, counted / by `check`
real       tokens that are neither padding nor a stand-in's; `busy`: and no rank waits meanwhile

FLOPs a pair and tokens are of batches as training makes them, for eight ranks, from stand-ins of
the 27 sources of the mix (_mix.py): blank pictures and words of about the sizes of the real ones.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import _weightless as weightless
import torch
from _mix import SOURCES, MadePairs
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
from metaembed_pl.model.lora import set_trainable
from metaembed_pl.model.processing import Processing
from metaembed_pl.model.weightless import RoughTokenizer
from metaembed_pl.training.memory import GIB, Step, estimate

RESULTS = Path(__file__).parent / "results"
RECIPES = ("qwen3b", "qwen7b", "qwen32b", "llama11b", "paligemma3b", "qwen3vl8b")
NUM_STEPS = 1  # global batches of each source
SHORT = 100  # tokens of a text that is counted
PICTURE = Image.new("RGB", (2048, 2048), "gray")  # above the limits of all recipes


class ShapeTokenizer(RoughTokenizer):
    """Knows the mark of an image and as many ids as other words would have.

    Args:
        mark: of an image, such as `<|image_pad|>`.
        mark_id: its id.
    """

    def __init__(self, mark: str, mark_id: int):
        self._mark, self._mark_id = mark, mark_id

    def convert_tokens_to_ids(self, token: str) -> int:
        """Of a special token."""
        return self._mark_id if token == self._mark else 1

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        """Ids of each text."""
        return {"input_ids": [self._ids(text) for text in texts]}

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(text.split(self._mark)):
            ids += [self._mark_id] * (number > 0) + [2] * self._count(part)
        return ids


class SizesOnly:
    """An image processor that prepares one picture of each size and gives shapes alone.

    Args:
        real: the model's.
    """

    def __init__(self, real: Any):
        self._real = real
        self._seen: dict[Any, dict[str, Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, images: list[list[Image.Image]], **options: Any) -> dict[str, Tensor]:
        """What is seen of pictures; pixels are on the meta device."""
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
    """The model that a recipe trains, on the meta device, run as the recipe says."""
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
        set_trainable(model, family, module.lora, module.train_vision)
    image_processor = load_image_processor(str(folder))
    family.set_up(image_processor, config.to_dict(), backbone.min_pixels, backbone.max_pixels)
    processing = Processing(
        family,
        ShapeTokenizer(family.image_token, _image_id(config)),
        SizesOnly(image_processor),
        module.prompt,
        backbone.max_text_tokens,
    )
    with torch.device("meta"):
        return MetaEmbedder(model, processing, module.groups, module.layout, module.projection)


@dataclass
class Trainee:
    """A recipe's model without weights, and how it is run.

    Args:
        recipe: as read.
        model: without weights.
        running: as `check` sees it.
    """

    recipe: Recipe
    model: MetaEmbedder
    running: Any

    @classmethod
    def of(cls, name: str) -> "Trainee":
        """The trainee of a recipe of ours."""
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
        """A forward and a backward pass as training runs them."""
        mixed = "mixed" in self.running.precision and not self.running.stage
        return weightless.count(self.model, calls, autocast=mixed)

    def count_least(self, calls: list[tuple[Any, Any]]) -> weightless.Counted:
        """The same where nothing is computed that training does not need."""
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
    """What the operations of a forward call are linear in.

    Args:
        tokens: of all rows, padding included.
        pairs: of tokens of a row.
        patches: of all pictures, or pictures where all are of one size.
        patch_pairs: of patches of a picture that see each other, over all layers.
        looking: rows of a call that has a picture: cross-attention is run for all of them.
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


def _patch_pairs(vision: Any, num_patches: int) -> int:
    """Over all layers of a tower; some see only their window."""
    full = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2
    return num_patches * (full * num_patches + (vision.depth - full) * min(window, num_patches))


def num_patches(inputs: dict[str, Tensor]) -> list[int]:
    """Of each picture of a call; 1 for each where all are of one size."""
    if "image_grid_thw" in inputs:
        return inputs["image_grid_thw"].prod(dim=1).tolist()
    return [1] * len(inputs["pixel_values"]) if "pixel_values" in inputs else []


class Cost:
    """Operations of any call, from those that were counted at some.

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
    """As many tokens to `RoughTokenizer`."""
    return " app" * num_tokens


@dataclass
class Costs:
    """What is counted of a recipe's model.

    Args:
        flops: of a call as training runs it.
        once: of the tower's forward pass.
        forward: of the rest, at the least.
        backward: likewise.
        fit_error: of `flops`, at a call that it does not follow from; None where all serve.
        kept: bytes of a picture and of a text, at the limits.
        step: a query and two candidates, all at the limits but one a token shorter.
    """

    flops: Cost
    once: Cost
    forward: Cost
    backward: Cost
    fit_error: float | None
    kept: dict[str, dict[str, int]]
    step: weightless.Counted


def costs(trainee: Trainee) -> Costs:
    """Counts a recipe's model at some shapes."""
    model = trainee.model
    config: Any = model.backbone.config
    process, limit = model.processor(), model.processing.max_text_tokens

    def call(*items: Item) -> tuple[dict[str, Tensor], Work]:
        inputs = process(items, "query")
        return inputs, _work(config, inputs)

    text, long = call(Item(text_of(limit))), call(Item(text_of(limit), PICTURE))
    calls = {"text": text, "picture": call(Item("a", PICTURE))}
    if "mllama" in config.model_type:
        calls |= {"both": long, "mixed": call(Item("a", PICTURE), Item(text_of(SHORT)))}
    counted, least = {}, {}
    for name, (inputs, _) in calls.items():
        counted[name] = trainee.count([(inputs, "query")])
        if name == "text" or len(calls) > 2:
            least[name] = trainee.count_least([(inputs, "query")])
    works = {name: work for name, (_, work) in calls.items()}
    flops = Cost([(works[n], c.flops - c.attention, c.attention) for n, c in counted.items()])
    step = _step_calls(trainee)
    found = trainee.count([(inputs, side) for inputs, side in step])
    expected = sum(flops(_work(config, inputs)) for inputs, _ in step)
    return Costs(
        flops,
        Cost(
            [
                (
                    replace(works[n], tokens=0, pairs=0, looking=0, looking_tokens=0),
                    c.vision - c.seen,
                    c.seen,
                )
                for n, c in counted.items()
            ]
        ),
        Cost(
            [(replace(works[n], patches=0, patch_pairs=0), *_forward(c)) for n, c in least.items()]
        ),
        Cost(
            [(replace(works[n], patches=0, patch_pairs=0), *_backward(c)) for n, c in least.items()]
        ),
        None if len(calls) > 4 else expected / found.flops - 1,
        {name: counted[name].kept for name in ("picture", "text")},
        found,
    )


def _forward(least: weightless.Counted) -> tuple[float, float]:
    """Of what is not the tower: without attention, and attention."""
    attention = (least.attention - least.seen) * FORWARD_SHARE
    return least.forward - least.vision - attention, attention


def _backward(least: weightless.Counted) -> tuple[float, float]:
    attention = (least.attention - least.seen) * (1 - FORWARD_SHARE)
    return least.backward - attention, attention


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


def pieces(side: Any) -> list[dict[str, Tensor]]:
    """The forward calls of one side of a batch."""
    return [side] if isinstance(side, dict) else [chunk.inputs for chunk in side]


def rows_of(config: Any, inputs: dict[str, Tensor]) -> list[Work]:
    """Of each item of a call, as if it were encoded by itself without padding."""
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


def batches_of(trainee: Trainee, source: Any, num_ranks: int) -> list[list[Any]]:
    """Global batches of a source: of each, what each rank gets."""
    data = trainee.recipe.data
    assert data is not None
    size = data.global_batch_size
    pairs = MadePairs(source, size * NUM_STEPS)
    plan = Plan([PlannedSource(source.name, (len(pairs),))], size)
    made = TrainingBatches([pairs], [data.num_negatives], plan, trainee.model.processor())  # pyright: ignore[reportArgumentType]
    made.in_chunks = True
    made.max_chunk_tokens = trainee.recipe.model.max_chunk_tokens  # pyright: ignore[reportOptionalMemberAccess]
    made.num_ranks = num_ranks
    found = []
    with mock.patch("metaembed_pl.data.batches.decoded", lambda pair: pair):
        for step in range(NUM_STEPS):
            ranks = []
            for rank in range(num_ranks):
                made.rank = rank
                ranks.append(made.load(step))
            found.append(ranks)
    return found


def in_step(calls: list[list[Any]], nothing: Any) -> list[list[Any]]:
    """Equally many calls on each rank, as where weights are shared out."""
    most = max(map(len, calls))
    return [[*of_rank, *[nothing] * (most - len(of_rank))] for of_rank in calls]


def of_source(trainee: Trainee, cost: Costs, source: Any) -> dict[str, float]:
    """A pair of a source: operations, the least of them, and shares of tokens."""
    config: Any = trainee.model.backbone.config
    redone = trainee.running.is_checkpointed
    num_ranks = trainee.running.num_gpus
    total = needed = recomputed = slowest = 0.0
    real = computed = waited = pairs = 0
    for ranks in batches_of(trainee, source, num_ranks):
        of_ranks, tokens = [], []
        sides = [[pieces(batch.queries), pieces(batch.candidates)] for batch in ranks]
        run = [list(side) for side in zip(*sides, strict=True)]
        if trainee.running.stage == 3:
            nothing = map(trainee.model.processor().smallest_row, ("query", "candidate"))
            run = [in_step(side, row) for side, row in zip(run, nothing, strict=True)]
        for batch, needs, *calls in zip(ranks, sides, *run, strict=True):
            pairs += len(batch.keys)
            calls = [call for side in calls for call in side]
            of_ranks.append(sum(cost.flops(_work(config, call)) for call in calls))
            tokens.append(sum(call["input_ids"].numel() for call in calls))
            for call in (call for side in needs for call in side):
                real += int(call["attention_mask"][: len(call["slot_index"])].sum())
                for row in rows_of(config, call):
                    needed += cost.once(row) + cost.forward(row) + cost.backward(row)
                    recomputed += cost.forward(row) if redone else 0
        total += sum(of_ranks)
        slowest += num_ranks * max(of_ranks)
        computed += sum(tokens)
        waited += num_ranks * max(tokens)
    return {
        "flops": total / pairs,
        "least": needed / pairs,
        "redone": recomputed / pairs,
        "waited": slowest / pairs,
        "tokens": computed / pairs,
        "real": real / computed,
        "busy": real / waited,
    }


def _work(config: Any, inputs: dict[str, Tensor]) -> Work:
    rows, length = inputs["input_ids"].shape
    return Work.of(config, rows, length, num_patches(inputs))


def of_mix(trainee: Trainee, cost: Costs) -> dict[str, Any]:
    """A pair of the mix, sources weighed by their pairs."""
    found = {source.name: of_source(trainee, cost, source) for source in SOURCES}
    weights = {source.name: source.num_pairs for source in SOURCES}
    whole = sum(weights.values())
    mean = {
        key: sum(weights[name] * each[key] for name, each in found.items()) / whole
        for key in ("flops", "least", "redone", "waited", "tokens")
    }
    for key in ("real", "busy"):  # shares of tokens
        tokens = {name: weights[name] * each["tokens"] for name, each in found.items()}
        tokens = {
            n: t * (found[n]["real"] / found[n]["busy"] if key == "busy" else 1)
            for n, t in tokens.items()
        }
        mean[key] = sum(t * found[n][key] for n, t in tokens.items()) / sum(tokens.values())
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
    """All that is counted of a recipe."""
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


HEAD = (
    f"{'recipe':12} {'TFLOPs':>7} {'least':>6} {'redone':>6} {'ratio':>6} {'waited':>6} {'fit':>6}"
    f" {'picture':>8} {'text':>6} {'peak':>6} {'check':>6} {'real':>5} {'busy':>5}  worst source"
)


def shown(name: str, row: dict[str, Any]) -> str:
    """A line of the table: TFLOPs of a pair, GiB of one row and of a step's activations."""
    kept = {key: sum(parts.values()) / GIB for key, parts in row["kept"].items()}
    counted, estimated = row["memory"]["counted"], row["memory"]["check"]
    return (
        f"{name:12} {row['flops'] / 1e12:7.1f} {row['least'] / 1e12:6.1f} "
        f"{row['redone'] / 1e12:6.1f} {row['ratio']:6.2f} {row['waited'] / row['flops']:6.2f} "
        f"{row['fit_error'] or 0:6.1%} {kept['picture']:8.2f} {kept['text']:6.2f} "
        f"{counted['activations'] / GIB:6.1f} {estimated['activations'] / GIB:6.1f} "
        f"{row['real']:5.0%} {row['busy']:5.0%}  {row['worst_source']} {row['worst_real']:.0%}"
    )


PARTS = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "activations": ("activations",),
    "loss": ("gathered", "loss"),
}


def parts(name: str, row: dict[str, Any]) -> str:
    """What was counted of a GPU's memory in GiB, beside what `check` estimates of the same.

    `check` counts gradients twice under DDP, for its buckets, which are not visible here. For
    strategies that shard, both numbers are those before sharding.
    """
    counted, estimated = row["memory"]["counted"], row["memory"]["check_alone"]
    found = []
    for part, of_check in PARTS.items():
        both = counted[part] / GIB, sum(estimated[each] for each in of_check) / GIB
        found.append(f"{part} {both[0]:.2f} / {both[1]:.2f} ({both[1] / both[0] - 1:+.0%})")
    return f"{name:12} {', '.join(found)}"


def markdown(names: list[str], folder: Path) -> str:
    """Saved counts as a table, one after the other for each recipe: what docs/scale.md shows."""
    saved = [json.loads((folder / f"real-shapes-{name}.json").read_text()) for name in names]
    lines = [
        "| recipe | | TFLOP a pair | least | redone | ratio | real | GiB a picture | a text "
        "| peak | `check` |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        for name, found in zip(names, saved, strict=True):
            if recipe in found:
                lines.append(f"| `{recipe}` | {name} | {_cells(found[recipe])} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> str:
    kept = {key: sum(parts.values()) / GIB for key, parts in row["kept"].items()}
    counted, estimated = row["memory"]["counted"], row["memory"]["check"]
    tera = [f"{row[key] / 1e12:.1f}" for key in ("flops", "least", "redone")]
    bytes_ = [f"{kept['picture']:.2f}", f"{kept['text']:.2f}"]
    peaks = [f"{each['activations'] / GIB:.1f}" for each in (counted, estimated)]
    return " | ".join([*tera, f"{row['ratio']:.2f}", f"{row['real']:.0%}", *bytes_, *peaks])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Counts, prints a line for each recipe, saves if asked to."""
    parser = argparse.ArgumentParser(description="What the recipes cost at their real size.")
    add = parser.add_argument
    add("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    add("--save", metavar="NAME", help="write real-shapes-NAME.json into --out")
    add("--table", nargs="+", metavar="NAME", help="print saved counts as a table")
    add("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.table:
        print(markdown(options.table, options.out))
        return {}
    print(HEAD)
    found = {}
    for name in options.recipes:
        found[name] = of_recipe(name)
        print(shown(name, found[name]), flush=True)
        print(parts(name, found[name]), flush=True)
        if options.save:
            file = options.out / f"real-shapes-{options.save}.json"
            kept = json.loads(file.read_text()) if file.is_file() else {}
            file.write_text(json.dumps(kept | found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
