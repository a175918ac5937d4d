"""ViDoRe v1, v2 and v3: questions to pages of documents, all pages of a set in one pool.

v2 has graded judgements (0, 1, 2; above 0 counts; of duplicates the highest), and four sets in
seven tasks: three sets have queries in four languages, evaluated on all of them (multilingual) and
on English only. nDCG@5 for v1 and v2, nDCG@10 for v3.

The expected sizes are those in mteb (descriptive_stats); a test compares them.

Source: ViDoRe, arXiv 2407.01449; v2, arXiv 2505.17166.
"""

from collections.abc import Sequence

from metaembed_pl.evaluation.benchmarks import Benchmark, Reference, Task

# Hub id below vidore/ -> task, queries, pages.
V1 = {
    "arxivqa_test_subsampled_beir": ("ArxivQA", 500, 500),
    "docvqa_test_subsampled_beir": ("DocVQA", 451, 500),
    "infovqa_test_subsampled_beir": ("InfoVQA", 494, 500),
    "tabfquad_test_subsampled_beir": ("TabFQuAD", 280, 70),
    "tatdqa_test_beir": ("TAT-DQA", 1646, 277),
    "shiftproject_test_beir": ("Shift Project", 100, 1000),
    "syntheticDocQA_artificial_intelligence_test_beir": ("Artificial Intelligence", 100, 968),
    "syntheticDocQA_energy_test_beir": ("Energy", 100, 977),
    "syntheticDocQA_government_reports_test_beir": ("Government Reports", 100, 972),
    "syntheticDocQA_healthcare_industry_test_beir": ("Healthcare Industry", 100, 965),
}

# Hub id below vidore/ -> task, queries in all languages, in English, pages.
VIDORE_V2_SETS = {
    "esg_reports_human_labeled_v2": ("ESG human", 52, 52, 1538),
    "economics_reports_v2": ("Economics", 232, 58, 452),
    "biomedical_lectures_v2": ("Biomedical", 640, 160, 1016),
    "esg_reports_v2": ("ESG synthetic", 228, 57, 1538),
}

# Hub id below vidore/vidore_v3_ -> task, queries in all six languages, pages.
V3 = {
    "finance_en": ("Finance, English", 1854, 2942),
    "finance_fr": ("Finance, French", 1920, 2384),
    "computer_science": ("Computer science", 1290, 1360),
    "hr": ("HR", 1908, 1110),
    "energy": ("Energy", 1848, 2225),
    "industrial": ("Industrial", 1698, 5244),
    "pharmaceuticals": ("Pharmaceuticals", 2184, 2313),
    "physics": ("Physics", 1812, 1674),
}


def page_task(
    name: str,
    source: str,
    metric: str,
    labels: tuple[str, ...],
    counts: Sequence[int | None],
    subset: str,
    where: dict[str, str] | None = None,
) -> Task:
    """A set of pages that `prepare vidore --subset SUBSET` writes; its folder is named like it."""
    folder = f"vidore/{source.rpartition('/')[2]}"
    command = f"metaembed-pl prepare vidore --subset {subset}"
    return Task(name, folder, metric, labels, source, where, *counts, prepare=command)


def set_of(name: str, metric: str, labels: tuple[str, ...], english: bool = False) -> Task:
    """A set of ViDoRe v2, with all of its languages or in English alone."""
    title, num_queries, num_english, num_pages = VIDORE_V2_SETS[name]
    if num_queries != num_english:
        title += " English" if english else " multilingual"
    counts = (num_english if english else num_queries, num_pages)
    where = {"language": "english"} if english else None
    return page_task(title, f"vidore/{name}", metric, labels, counts, "v2", where)


VIDORE_V1 = Benchmark(
    "vidore_v1",
    "ViDoRe v1",
    tuple(
        page_task(title, f"vidore/{name}", "ndcg@5", (), counts, "v1")
        for name, (title, *counts) in V1.items()
    ),
    (Reference("MetaEmbed-3B", "16x64", 88.7),),
)

VIDORE_V2 = Benchmark(
    "vidore_v2",
    "ViDoRe v2",
    (
        set_of("esg_reports_human_labeled_v2", "ndcg@5", ()),
        set_of("economics_reports_v2", "ndcg@5", ("multilingual",)),
        set_of("biomedical_lectures_v2", "ndcg@5", ("multilingual",)),
        set_of("esg_reports_v2", "ndcg@5", ("multilingual",)),
        set_of("biomedical_lectures_v2", "ndcg@5", ("English",), english=True),
        set_of("esg_reports_v2", "ndcg@5", ("English",), english=True),
        set_of("economics_reports_v2", "ndcg@5", ("English",), english=True),
    ),
    (
        Reference(
            "MetaEmbed-3B",
            "16x64",
            60.3,
            {
                "ESG human": 63.7,
                "Economics multilingual": 55.5,
                "Biomedical multilingual": 58.7,
                "ESG synthetic multilingual": 57.4,
                "Biomedical English": 61.7,
                "ESG synthetic English": 62.6,
                "Economics English": 62.3,
            },
        ),
        Reference("MetaEmbed-7B", "16x64", 61.3),
        Reference("MoCa-3B", "", 59.8),
        Reference("MoCa-7B", "", 58.8),
        Reference("GME-7B", "", 59.3),
        Reference("mmE5-11B", "", 50.5),
        Reference("ColPali", "", 54.5),
        Reference("ColQwen2.5", "", 60.6),
        Reference("Nemotron ColEmbed V2 8B", "", 65.2),
    ),
)

VIDORE_V3 = Benchmark(
    "vidore_v3",
    "ViDoRe v3, public sets",
    tuple(
        page_task(title, f"vidore/vidore_v3_{name}", "ndcg@10", (), counts, "v3")
        for name, (title, *counts) in V3.items()
    ),
    (Reference("Nemotron ColEmbed V2 8B", "", 63.4),),
)
