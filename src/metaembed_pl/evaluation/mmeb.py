"""MMEB: 36 sets, where each query has its own list of at most 1,000 candidates, by precision@1.

The reference evaluator takes the argmax over a list whose first entry is the positive, so that ties
go to the model: a model that gives every candidate the same vector scores 100. Here ties count
against it, and a duplicate candidate in a list counts once. Without ties, both ways give the same
numbers.

MMEB-V2 adds 24 sets of visual documents, each one pool of pages, by nDCG@5 with gains as they are.
Its 18 video sets are not supported. For the pages of ViDoSeek and MMLongBench, the sets that
VLM2Vec has since corrected are used (`page-fixed`), as on its leaderboard; earlier scores differ.

The expected sizes are those in mteb (descriptive_stats) or on the hub's card; for the corrected
sets those in VLM2Vec's own score files.

Source: VLM2Vec, arXiv 2410.05160, table 1; VLM2Vec-V2, arXiv 2507.04590, and its loaders.
"""

from dataclasses import replace

from metaembed_pl.evaluation.benchmarks import Benchmark, Reference, Task
from metaembed_pl.evaluation.vidore import VIDORE_V1, VIDORE_V2_SETS, page_task, set_of

IN, OUT = "in distribution", "out of distribution"
IMAGE, DOCUMENTS, OOD = "image", "visual documents", "visual documents, OOD"

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

# Hub id below openbmb/VisRAG-Ret-Test- -> queries, pages.
VISRAG = {
    "ArxivQA": (816, 8066),
    "ChartQA": (63, 500),
    "MP-DocVQA": (591, 741),
    "SlideVQA": (556, 1284),
    "InfoVQA": (718, 459),
    "PlotQA": (863, 9593),
}

# Hub id below VLM2Vec/ -> task, and its queries and pages.
VISDOC_OOD = {
    "ViDoSeek-page-fixed": ("ViDoSeek-page", (1142, None)),
    "ViDoSeek": ("ViDoSeek-doc", (1142, 5349)),
    "MMLongBench-page-fixed": ("MMLongBench-page", (838, None)),
    "MMLongBench-doc": ("MMLongBench-doc", (838, 6492)),
}


def _image_tasks(extra: tuple[str, ...] = ()) -> tuple[Task, ...]:
    return tuple(
        Task(
            name,
            f"mmeb_eval/{name}",
            "precision@1",
            (meta, distribution, *extra),
            "TIGER-Lab/MMEB-eval",
            prepare="metaembed-pl prepare mmeb_eval",
        )
        for meta, parts in SETS.items()
        for distribution, names in zip((IN, OUT), parts, strict=True)
        for name in names.split()
    )


def _document_tasks() -> tuple[Task, ...]:
    v1 = [replace(task, labels=("ViDoRe v1", DOCUMENTS)) for task in VIDORE_V1.tasks]
    v2 = [set_of(name, "ndcg@5", ("ViDoRe v2", DOCUMENTS)) for name in VIDORE_V2_SETS]
    return (
        # Some of ViDoRe's sets are called as image sets are.
        *(replace(task, name=f"ViDoRe {task.name}") for task in (*v1, *v2)),
        *(
            page_task(
                f"VisRAG {name}",
                f"openbmb/VisRAG-Ret-Test-{name}",
                "ndcg@5",
                ("VisRAG", DOCUMENTS),
                counts,
                "visrag",
            )
            for name, counts in VISRAG.items()
        ),
        *(
            page_task(task, f"VLM2Vec/{name}", "ndcg@5", (OOD, DOCUMENTS), counts, "visdoc_ood")
            for name, (task, counts) in VISDOC_OOD.items()
        ),
    )


MMEB = Benchmark(
    "mmeb",
    "MMEB",
    _image_tasks(),
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
    (*_image_tasks((IMAGE,)), *_document_tasks()),
    # The leaderboard's means of 36 and 24 sets, put together.
    (Reference("Qwen3-VL-Embedding-8B", "", 81.0, {IMAGE: 80.12, DOCUMENTS: 82.36}),),
)
