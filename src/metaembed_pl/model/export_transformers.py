"""The export format for plain transformers: meta tokens as words of the vocabulary.

Vocabularies have unused rows: beyond the tokenizer's words (Qwen), or for reserved words (Llama,
Gemma). The learned vectors are written into such rows, and words for them are added to the
tokenizer. Any program that runs the backbone then computes the meta embeddings as the last hidden
states of these words: docs/export.md.

Shape letters: B items, K slots a row, R meta embeddings of a side, D their width.
"""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from metaembed_pl.data.collate import Side
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.export import (
    Difference,
    Vectors,
    compare,
    known_identity,
    sample_items,
    sample_vectors,
)

FORM, PROJECTION = "retrieval.json", "projection.safetensors"
RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>|<unused\d+>")


def write_transformers(
    model: MetaEmbedder, folder: Path, renamed: tuple[str, str] = ("", "")
) -> Difference:
    """Writes the files into an existing folder, reads them back and compares the vectors.

    Args:
        model: without an adapter; spare rows of its input embedding are overwritten.
        folder: gets weights, tokenizer, image processor, `retrieval.json` (the words around an
            item) and the projection, if any, as `projection.safetensors`.
        renamed: the prefix of weights' names, and that in the file; `AutoModel` must know both.
    """
    if model.pooling != "meta_tokens":
        raise UserError(
            f"this form is for models with meta tokens; this one pools by {model.pooling}: use "
            "--format metaembed or sentence-transformers"
        )
    before, identity = sample_vectors(model), known_identity(model)
    tokenizer = copy.deepcopy(model.processing.tokenizer)
    table: Any = model.backbone.get_input_embeddings()
    words = spare_words(tokenizer, table.num_embeddings, model.meta_tokens.embedding.num_embeddings)
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(words), device=table.weight.device)
    with torch.no_grad():
        table.weight[ids] = model.meta_tokens.embedding.weight.to(table.weight.dtype)
    old, new = renamed
    weights = {
        new + name.removeprefix(old) if name.startswith(old) else name: part
        for name, part in model.backbone.state_dict().items()
    }
    model.backbone.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    model.processing.image_processor.save_pretrained(folder)
    if not isinstance(model.projection, nn.Identity):
        projection = {"projection": model.projection.weight.detach().contiguous()}
        save_file(projection, folder / PROJECTION)
    form = _form(model, words) | {"identity": identity}
    (folder / FORM).write_text(json.dumps(form, indent=2, ensure_ascii=False) + "\n")
    after = Vectors(*(_plain_vectors(folder, model, side, form) for side in get_args(Side)))
    return compare(before, after, model.backbone.dtype, "plain transformers")


def spare_words(tokenizer: Any, num_rows: int, count: int) -> list[str]:
    """Words for `count` unused of the `num_rows` rows of the input embedding.

    They are added to the tokenizer.
    """
    vocabulary = tokenizer.get_vocab()
    reserved = sorted((i, word) for word, i in vocabulary.items() if RESERVED.fullmatch(word))
    words = [word for i, word in reserved if i < num_rows][:count]
    free = num_rows - len(tokenizer)
    if len(words) < count:
        if free < count:
            raise UserError(
                f"this format writes {count} meta tokens into unused rows of the vocabulary, and "
                f"this model has {max(free, len(words))}; use --format metaembed or "
                "sentence-transformers"
            )
        words = [f"<|meta_{i}|>" for i in range(count)]
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    return words


def _form(model: MetaEmbedder, words: Sequence[str]) -> dict[str, Any]:
    """The words around an item, which are not in the weights."""
    prompt = model.processing.prompt
    num_query, num_candidate, _ = model.groups[-1]
    first = 0 if model.meta_tokens.layout == "both" else num_query
    return {
        "prefix": prompt.prefix,
        "before_text": prompt.before_text,
        "image_only": prompt.image_only,
        "suffix": prompt.suffix,
        "max_text_tokens": model.processing.max_text_tokens,
        "groups": [str(group) for group in model.groups],
        "width": model.width,
        "widths": list(model.widths),
        "query": {
            "before": prompt.query,
            "meta_tokens": "".join(words[:num_query]),
            "count": num_query,
        },
        "candidate": {
            "before": "",
            "meta_tokens": "".join(words[first:]),
            "count": num_candidate,
        },
    }


def _plain_vectors(
    folder: Path, model: MetaEmbedder, side: Side, form: dict[str, Any]
) -> Float[Tensor, "B R D"]:
    """Meta embeddings by the library's own model, from the folder, with the words as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModel.from_pretrained(folder, dtype=model.backbone.dtype).eval()
    items: list[Item] = sample_items()
    family = model.processing.family
    batch = dict(model.processor()(items, side))
    slots = batch.pop("slot_index")
    words = tokenizer(form[side]["meta_tokens"], add_special_tokens=False)["input_ids"]
    if len(words) != slots.shape[1]:
        raise UserError("this tokenizer does not keep meta tokens apart; use another format")
    batch["input_ids"].scatter_(1, slots, torch.tensor(words).expand(len(items), -1))
    with torch.inference_mode():
        pictures, inputs = family.split(batch)
        with family.shown(plain, inputs, family.see(plain, pictures)) as ready:
            hidden = plain(**ready, use_cache=False).last_hidden_state
        own = slots[:, -form[side]["count"] :, None].expand(-1, -1, hidden.shape[-1])
        states = hidden.gather(1, own).to(model.meta_tokens.embedding.weight.dtype)
        states = model.projection(states)
    return nn.functional.normalize(states.float(), dim=-1)
