"""The card of an exported model: what it is, how good at which budget, and what it came from."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

SHOWN = ("recall@1", "ndcg@5")
METRIC = re.compile(r"(?P<part>[^/]+)/(?P<dataset>.+)/(?P<metric>[^/]+)/(?P<budget>\d+x\d+)")

USE = {
    "metaembed": """from metaembed_pl import MetaEmbedder

model = MetaEmbedder.from_pretrained("{name}")
queries = model.encode_query(["a red apple"])
candidates = model.encode_candidate([{{"image": "apple.png"}}, {{"text": "a fruit"}}])
scores = model.score(queries, candidates, budget="{budget}")""",
    "sentence-transformers": """from sentence_transformers import MultiVectorEncoder

model = MultiVectorEncoder("{name}", trust_remote_code=True)  # needs metaembed-pl installed
queries = model.encode_query(["a red apple"])
candidates = model.encode_document([{{"image": "apple.png"}}, {{"text": "a fruit"}}])
scores = model.similarity(queries, candidates)""",
    "transformers": """from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}")
# The words around an item, and the meta tokens as words, are in retrieval.json;
# the last hidden states of the last words are the meta embeddings, once normalised.""",
}


def model_card(
    name: str,
    form: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
    recipe: Mapping[str, Any] | None,
    base: str | None,
    licence: str | None,
) -> str:
    """A README with the header that the hub reads.

    Args:
        name: of the model, as others will load it.
        form: which of `USE`.
        settings: `metaembed.json` of the model.
        metrics: `metrics.json` of its report; may be empty.
        recipe: the resolved recipe; None where it is not known.
        base: hub id of the model it was trained from; None where there is none.
        licence: of the weights; None where it is not known.
    """
    header = {
        "license": licence,
        "base_model": base,
        "library_name": "metaembed-pl" if form == "metaembed" else form,
        "pipeline_tag": "visual-document-retrieval",
        "tags": ["multi-vector", "late-interaction", "matryoshka", "metaembed"],
    }
    groups = settings["groups"]
    use = USE[form].format(name=name, budget=groups[len(groups) // 2])
    sections = [
        "---\n" + _yaml({key: value for key, value in header.items() if value}) + "---",
        f"# {name.rpartition('/')[2]}",
        "A multi-vector retriever of texts and images. Choose at search time how many vectors of "
        f"a query and of a candidate to spend: {', '.join(groups)}.",
        f"```python\n{use}\n```",
        _about(settings, base, licence),
        _table(metrics, groups),
    ]
    if recipe:
        sections += ["## Recipe", f"```yaml\n{_yaml(recipe)}```"]
    sections += ["## Versions", f"```yaml\n{_yaml(settings['versions'])}```"]
    return "\n\n".join(section for section in sections if section) + "\n"


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)


def _about(settings: Mapping[str, Any], base: str | None, licence: str | None) -> str:
    rows = {
        "width of a vector": settings["width"],
        "vectors of a query, of a candidate": settings["groups"][-1].replace("x", ", "),
        "meta-token layout": settings["layout"],
        "backbone": f"{settings['model_type']}, {settings['dtype']}",
        "trained from": base or "random weights",
        "licence of the weights": licence or "not stated",
    }
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    )


def _table(metrics: Mapping[str, float], groups: list[str]) -> str:
    """Datasets and metrics down, budgets across."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in metrics.items():
        match = METRIC.fullmatch(key)
        if match and match["metric"] in SHOWN and match["budget"] in groups:
            found.setdefault((match["dataset"], match["metric"]), {})[match["budget"]] = value
    if not found:
        return ""
    lines = [
        "## Quality by budget",
        "",
        f"| dataset | metric | {' | '.join(groups)} |",
        "|---|---|" + "---|" * len(groups),
    ]
    for (dataset, metric), values in sorted(found.items()):
        cells = [f"{values[group]:.3f}" if group in values else "" for group in groups]
        lines.append(f"| {dataset} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)
