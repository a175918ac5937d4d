"""The export format for vLLM: that of plain transformers, plus the files that vLLM needs.

With this package installed next to vLLM, `vllm serve FOLDER` returns only meta embeddings
(serving/vllm_plugin.py). Without it, vLLM returns the hidden states of all tokens, whose last rows
are the meta embeddings: docs/export.md.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from metaembed_pl.data.collate import Cut, Side
from metaembed_pl.errors import UserError
from metaembed_pl.files import read_json_object
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.export import Difference
from metaembed_pl.model.export_transformers import FORM, PROJECTION, write_transformers

# Our class in vLLM, and vLLM's own, which it takes where our package is not installed.
ARCHITECTURES = {
    "qwen2_vl": ("MetaEmbedQwen2VL", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("MetaEmbedQwen2_5_VL", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("MetaEmbedQwen3VL", "Qwen3VLForConditionalGeneration"),
}
# vLLM knows weights by the names that the hub's own checkpoints have.
RENAMED = {
    "qwen2_vl": ("language_model.", "model."),
    "qwen2_5_vl": ("language_model.", "model."),
    "qwen3_vl": ("", "model."),
}
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = """\
{{%- set meta_tokens = {meta_tokens} -%}}
{{%- set before = {before} -%}}
{{%- for message in messages -%}}
{{%- if message.role not in meta_tokens -%}}
{{{{ raise_exception("the role must be query or candidate, got " ~ message.role) }}}}
{{%- endif -%}}
{{{{ {prefix} }}}}
{{%- set found = namespace(text="") -%}}
{{%- for part in message.content -%}}
{{%- if part.type == "text" -%}}{{%- set found.text = found.text ~ part.text -%}}
{{%- else -%}}{{{{ {picture} }}}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{ {before_text} ~ before[message.role] ~ (found.text or {image_only}) ~ {suffix} }}}}
{{{{- meta_tokens[message.role] }}}}
{{%- endfor -%}}
"""


def write_vllm(model: MetaEmbedder, folder: Path) -> Difference:
    """Writes the files into an existing folder; see `write_transformers`."""
    kind = model.processing.family.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"--format vllm is there for {', '.join(ARCHITECTURES)}, not for {kind}; use "
            "--format transformers, whose vectors any program can compute"
        )
    difference = write_transformers(model, folder, RENAMED[kind])
    if (folder / PROJECTION).is_file():  # vLLM takes every such file for weights of the backbone
        (folder / "projection").mkdir()
        (folder / PROJECTION).rename(folder / "projection" / PROJECTION)
    form = read_json_object(folder / FORM)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _add_to_config(folder / "config.json", kind, form, tokenizer)
    (folder / "chat_template.jinja").write_text(chat_template(form), encoding="utf-8")
    return difference


def _add_to_config(file: Path, kind: str, form: Mapping[str, Any], tokenizer: Any) -> None:
    """Adds the class and the meta tokens to `config.json`."""
    config = read_json_object(file)
    config["architectures"] = list(ARCHITECTURES[kind])
    ids = {
        side: tokenizer(form[side]["meta_tokens"], add_special_tokens=False)["input_ids"]
        for side in ("query", "candidate")
    }
    config["metaembed"] = {
        "first_id": min(ids["query"]),
        "num_query": form["query"]["count"],
        "num_candidate": form["candidate"]["count"],
    }
    if kind == "qwen3_vl":  # transformers knows it by the class, vLLM needs the name
        config["text_config"]["rope_parameters"]["mrope_interleaved"] = True
    file.write_text(json.dumps(config, indent=2) + "\n")


def chat_template(form: Mapping[str, Any]) -> str:
    """A template for messages whose role is `query` or `candidate`, from `retrieval.json`."""
    sides = ("query", "candidate")
    words = {name: form[name] for name in ("prefix", "before_text", "image_only", "suffix")}
    words["picture"] = PICTURE
    words["meta_tokens"] = {side: form[side]["meta_tokens"] for side in sides}
    words["before"] = {side: form[side]["before"] for side in sides}
    return TEMPLATE.format(**{name: json.dumps(word) for name, word in words.items()})


class VllmPrompts:
    """Turns items into prompts for vLLM's offline engine, token for token as we read them.

        engine = LLM("custom", runner="pooling")
        found = engine.encode(VllmPrompts("custom")(items, "candidate"), pooling_task="token_embed")

    A text is cut and kept from forging pictures as everywhere else, which a server that gets
    messages does not do.

    Args:
        folder: of the form.

    Attributes:
        cut: of the texts so far.
    """

    def __init__(self, folder: str | Path):
        self.cut = Cut()
        self.form = read_json_object(Path(folder) / FORM)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def __call__(self, items: Sequence[Item], side: Side) -> list[dict[str, Any]]:
        """A prompt for each item."""
        return [self._prompt(item, side) for item in items]

    def _prompt(self, item: Item, side: Side) -> dict[str, Any]:
        form, image = self.form, item.load_image()
        words = item.words or form["image_only"]
        text = self._ids(form[side]["before"] + words, split_special_tokens=True)
        self.cut.note([len(text)], form["max_text_tokens"])
        head = form["prefix"] + (PICTURE if image is not None else "") + form["before_text"]
        ids = [
            *self._ids(head),
            *text[: form["max_text_tokens"]],
            *self._ids(form["suffix"] + form[side]["meta_tokens"]),
        ]
        pictures = {} if image is None else {"multi_modal_data": {"image": image}}
        return {"prompt_token_ids": ids, **pictures}

    def _ids(self, text: str, **settings: Any) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **settings)["input_ids"]
