"""MMEB: 36 sets, where each query has its own list of at most 1,000 candidates, by precision@1.

The reference evaluator takes the argmax over a list whose first entry is the positive, so that ties
go to the model: a model that gives every candidate the same vector scores 100. Here ties go against
it, and a candidate that stands twice in a list counts once. Where a model makes no ties, both ways
give the same numbers.

MMEB-V2 adds 24 sets of visual documents, by nDCG@5 with gains as they are. Its 18 video sets are
not here.

Source: VLM2Vec, arXiv 2410.05160, table 1; VLM2Vec-V2, arXiv 2507.04590.
"""

from metaembed_pl.evaluation.benchmarks import Benchmark, Reference, Task
from metaembed_pl.evaluation.vidore import VIDORE_V1, VIDORE_V2_SETS, set_of

IN, OUT = "in distribution", "out of distribution"

# Meta-task -> (sets that are in MMEB-train too, sets that are not).
SETS = {
    "classification": (
        "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
        "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ),
    "VQA": (
        "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
        "ScienceQA VizWiz GQA TextVQA",
    ),
    "retrieval": (
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "FashionIQ Wiki-SS-NQ OVEN EDIS",
    ),
    "grounding": ("MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing"),
}

VISRAG = "ArxivQA ChartQA MP-DocVQA SlideVQA InfoVQA PlotQA".split()
VISDOC_OOD = "ViDoSeek-page ViDoSeek-doc MMLongBench-page MMLongBench-doc".split()


def _image_tasks(extra: tuple[str, ...] = ()) -> tuple[Task, ...]:
    return tuple(
        Task(
            name,
            f"mmeb_eval/{name}",
            "precision@1",
            (meta, distribution, *extra),
            "TIGER-Lab/MMEB-eval",
        )
        for meta, parts in SETS.items()
        for distribution, names in zip((IN, OUT), parts, strict=True)
        for name in names.split()
    )


def _document_tasks() -> tuple[Task, ...]:
    visual = "visual documents"
    v1 = [
        Task(task.name, task.folder, "ndcg@5", ("ViDoRe v1", visual), task.source)
        for task in VIDORE_V1.tasks
    ]
    v2 = [set_of(name, "ndcg@5", ("ViDoRe v2", visual)) for name in VIDORE_V2_SETS]
    visrag = [
        Task(
            f"VisRAG {name}",
            f"visrag/{name}",
            "ndcg@5",
            ("VisRAG", visual),
            f"openbmb/VisRAG-Ret-Test-{name}",
        )
        for name in VISRAG
    ]
    others = [
        Task(
            name,
            f"visdoc/{name}",
            "ndcg@5",
            ("visual documents, OOD", visual),
            f"VLM2Vec/{name.rpartition('-')[0]}",
        )
        for name in VISDOC_OOD
    ]
    return (*v1, *v2, *visrag, *others)


MMEB = Benchmark(
    "mmeb",
    "MMEB",
    _image_tasks(),
    "python data_prep/mmeb_eval.py",
    (
        Reference("MetaEmbed-3B", "1x1", 65.4),
        Reference("MetaEmbed-3B", "16x64", 69.1),
        Reference("MetaEmbed-7B", "1x1", 71.3),
        Reference("MetaEmbed-7B", "8x16", 74.3),
        Reference("MetaEmbed-7B", "16x64", 76.6, {IN: 81.8}),
        Reference("MetaEmbed-32B", "1x1", 72.4),
        Reference("MetaEmbed-32B", "16x64", 78.7),
        Reference("MetaEmbed-11B (Llama-3.2-Vision)", "16x64", 65.1),
        Reference("same recipe, single vector, 3B", "", 65.8),
        Reference("same recipe, single vector, 7B", "", 71.6),
        Reference("same recipe, single vector, 32B", "", 72.1),
        Reference("MoCa-3B", "", 67.5),
        Reference("MoCa-7B", "", 71.5),
        Reference("mmE5-11B", "", 69.8),
        Reference("ReMatch-7B", "", 73.7),
        Reference("RzenEmbed-8B", "", 75.9),
        Reference("Qwen3-VL-Embedding-2B", "", 75.0),
        Reference("Qwen3-VL-Embedding-8B", "", 80.1),
    ),
)

MMEB_V2 = Benchmark(
    "mmeb_v2",
    "MMEB-V2, image and visual-document parts",
    (*_image_tasks(("image",)), *_document_tasks()),
    "python data_prep/mmeb_eval.py; python data_prep/vidore.py --subset v1 --subset v2",
)
