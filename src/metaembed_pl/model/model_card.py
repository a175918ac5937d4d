"""The model card of an exported model: description, quality by budget, origin."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from metaembed_pl.budget import budgets_of, parse_groups

SHOWN = ("recall@1", "ndcg@5")
METRIC = re.compile(r"(?P<part>[^/]+)/(?P<dataset>.+)/(?P<metric>[^/]+)/(?P<budget>\d+x\d+(x\d+)?)")

USE = {
    "metaembed": """from metaembed_pl import MetaEmbedder

model = MetaEmbedder.from_pretrained("{name}")
queries = model.encode_query(["a red apple"])
candidates = model.encode_candidate([{{"image": "apple.png"}}, {{"text": "a fruit"}}])
scores = model.score(queries, candidates, budget="{budget}")""",
    "sentence-transformers": """from sentence_transformers import MultiVectorEncoder

model = MultiVectorEncoder("{name}", trust_remote_code=True)
queries = model.encode_query(["a red apple"])
candidates = model.encode_document([{{"image": "apple.png"}}, {{"text": "a fruit"}}])
scores = model.similarity(queries, candidates)""",
    "transformers": """from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}")
# The words around an item, and the meta tokens as words, are in retrieval.json;
# the last hidden states of the last words are the meta embeddings, once normalised.""",
    "vllm": """# vllm serve {name} --runner pooling     (with metaembed-pl installed beside vLLM)
import requests

def meta_embeddings(role, content):  # role: query or candidate
    message = {{"role": role, "content": content}}
    request = {{"model": "{name}", "task": "token_embed", "messages": [message]}}
    found = requests.post("http://localhost:8000/pooling", json=request).json()
    return found["data"][0]["data"]

query = meta_embeddings("query", "a red apple")""",
}


INTENDED = """## Intended use

Retrieval: rank texts, pictures and pages for a query of text, picture or both. Scores order the
candidates of one query; they are no probabilities, and those of two queries do not compare."""

LIMITS = """## Limits

- Trained and measured on what is listed here; measure it on data of your own before you rely on it
  (`metaembed-pl evaluate --benchmark beir:DIR`).
- Texts are cut at {max_text_tokens} tokens, and large pictures are shrunk.
- It finds what its training data made alike, with their gaps and prejudices, and those of the model
  it was trained from.
- Vectors of another model, or of another version of this one, do not compare with these."""


def model_card(
    name: str,
    form: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
    recipe: Mapping[str, Any] | None,
    base: str | None,
    licence: str | None,
    datasets: Sequence[str],
    languages: Sequence[str],
    max_text_tokens: int,
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
        datasets: hub ids of what it was trained on.
        languages: codes of what it was trained for, such as `en`.
        max_text_tokens: where texts are cut.
    """
    groups, widths = settings["groups"], settings.get("widths", [])
    budgets = [str(budget) for budget in budgets_of(parse_groups(groups), widths)]
    results = list(_results(metrics, groups))
    header = ModelCardData(
        language=list(languages) or None,
        license=licence,
        base_model=base,
        datasets=list(datasets) or None,
        library_name="metaembed-pl" if form == "metaembed" else form,
        pipeline_tag="visual-document-retrieval",
        tags=["multi-vector", "late-interaction", "matryoshka", "metaembed"],
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    use = USE[form].format(name=name, budget=groups[len(groups) // 2])
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name.rpartition('/')[2]}",
        "A multi-vector retriever of texts and images. Choose at search time how many vectors of "
        f"a query and of a candidate to spend: {', '.join(groups)}."
        + (f" A third number keeps fewer dimensions: {budgets[-2]}." if widths else ""),
        f"```python\n{use}\n```",
        _about(settings, base, licence, datasets, languages),
        _table(metrics, budgets),
        INTENDED,
        LIMITS.format(max_text_tokens=max_text_tokens),
    ]
    if recipe:
        sections.append(_folded("Recipe", recipe))
    sections.append(_folded("Versions", settings["versions"]))
    return "\n\n".join(section for section in sections if section) + "\n"


def _folded(title: str, value: Mapping[str, Any]) -> str:
    """A section that opens when it is clicked."""
    return f"<details><summary>{title}</summary>\n\n```yaml\n{_yaml(value)}```\n\n</details>"


def _results(metrics: Mapping[str, float], groups: list[str]) -> Iterator[EvalResult]:
    """Results that the hub shows: every metric at the smallest and the largest budget."""
    for key, value in sorted(metrics.items()):
        match = METRIC.fullmatch(key)
        if match and match["metric"] in SHOWN and match["budget"] in (groups[0], groups[-1]):
            yield EvalResult(
                task_type="visual-document-retrieval",
                dataset_type=re.sub(r"[^\w.-]+", "-", match["dataset"]),
                dataset_name=match["dataset"],
                dataset_split=match["part"],
                metric_type=match["metric"].replace("@", "_at_"),
                metric_name=f"{match['metric']} at {match['budget']}",
                metric_value=round(value, 4),
            )


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)


def _about(
    settings: Mapping[str, Any],
    base: str | None,
    licence: str | None,
    datasets: Sequence[str],
    languages: Sequence[str],
) -> str:
    rows = {
        "width of a vector": settings["width"],
        "vectors of a query, of a candidate": settings["groups"][-1].replace("x", ", "),
        "meta-token layout": settings["layout"],
        "backbone": f"{settings['model_type']}, {settings['dtype']}",
        "trained from": base or "random weights",
        "trained on": ", ".join(datasets) or "not stated",
        "languages": ", ".join(languages) or "not stated",
        "licence of the weights": licence or "not stated",
    }
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    )


def _table(metrics: Mapping[str, float], budgets: list[str]) -> str:
    """Datasets and metrics down, budgets across."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in metrics.items():
        match = METRIC.fullmatch(key)
        if match and match["metric"] in SHOWN and match["budget"] in budgets:
            found.setdefault((match["dataset"], match["metric"]), {})[match["budget"]] = value
    if not found:
        return ""
    lines = [
        "## Quality by budget",
        "",
        f"| dataset | metric | {' | '.join(budgets)} |",
        "|---|---|" + "---|" * len(budgets),
    ]
    for (dataset, metric), values in sorted(found.items()):
        cells = [f"{values[name]:.3f}" if name in values else "" for name in budgets]
        lines.append(f"| {dataset} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)
