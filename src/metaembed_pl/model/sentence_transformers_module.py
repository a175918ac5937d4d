"""A MetaEmbed retriever for sentence-transformers; `metaembed-pl export` writes this file.

It needs sentence-transformers 6 or newer, but not metaembed-pl. The folder is one of
`metaembed_pl.MetaEmbedder`, for a Qwen-VL model with complete weights:

    from sentence_transformers import MultiVectorEncoder
    model = MultiVectorEncoder("FOLDER", trust_remote_code=True)

A row of token ids is [prefix ; picture ; text ; suffix ; slots]. The learned meta tokens are at
the slots; the normalised last hidden states there are the embeddings.
"""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import InputModule
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

FILES = "metaembed.json", "processing/processing.json", "meta_tokens.safetensors"
BERT_CONFIG = "sentence_bert_config.json"


class MetaEmbed(InputModule):
    """The input module, and the only one.

    Args:
        backbone: the language model with its vision tower.
        tokenizer: the backbone's.
        pictures: its image processor.
        settings: `metaembed.json`.
        form: `processing.json`: the words around an item.
        own: meta tokens, and the projection where there is one.
    """

    forward_kwargs = {"task"}  # noqa: RUF012
    tokenizer: Any

    def __init__(
        self, backbone: Any, tokenizer: Any, pictures: Any, settings: dict, form: dict, own: dict
    ):
        super().__init__()
        self.backbone, self.tokenizer, self.pictures = backbone, tokenizer, pictures
        self.settings, self.form = settings, form
        self.own = nn.ParameterDict(own)
        self.num_query, self.num_candidate = map(int, settings["groups"][-1].split("x"))

    @property
    def modalities(self) -> list[Any]:
        """The kinds of inputs; `message` stands for batches of several kinds."""
        return ["text", "image", ("image", "text"), ("text", "image"), "message"]

    def _ids(self, text: str, **settings: Any) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **settings)["input_ids"]

    def preprocess(
        self, inputs: Any, prompt: str | None = None, task: str | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Texts, pictures or `{"text": ..., "image": ...}` as tensors; a string is a text."""
        words, items = self.form["prompt"], [_parts(given) for given in inputs]
        images = [[_upright(image)] for _, image in items if image is not None]
        batch = dict(self.pictures(images=images, return_tensors="pt")) if images else {}
        counts = batch["image_grid_thw"].prod(1) // self.pictures.merge_size**2 if images else ()
        sizes, before = iter(map(int, counts)), words["query"] if task == "query" else ""
        rows = []
        for text, image in items:
            count = 0 if image is None else next(sizes)
            shown = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" if count else ""
            # A text is read without its special tokens: it cannot forge a picture.
            text = before + ((prompt or "") + text if text else words["image_only"])
            ids = self._ids(text, split_special_tokens=True)[: self.form["max_text_tokens"]]
            head = self._ids(words["prefix"] + shown + words["before_text"])
            rows.append([*head, *ids, *self._ids(words["suffix"])])
        num_slots = self._rows(task).stop - self._rows(task).start
        length, pad = max(map(len, rows)) + num_slots, self.tokenizer.pad_token_id
        batch["input_ids"] = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        ends = torch.tensor([[len(row) + num_slots] for row in rows])
        batch["attention_mask"] = (torch.arange(length) < ends).long()
        batch["slot_index"] = ends - num_slots + torch.arange(num_slots)
        image_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        batch["mm_token_type_ids"] = torch.eq(batch["input_ids"], image_id).long()
        return batch

    def _rows(self, task: str | None) -> slice:
        """The meta tokens at the end of an input of this side."""
        if task == "query":
            return slice(0, self.num_query)
        both = self.settings["layout"] == "both"
        return slice(0 if both else self.num_query, self.num_query + self.num_candidate)

    def forward(self, features: dict, task: str | None = None) -> dict[str, torch.Tensor]:
        """Adds `token_embeddings`: unit vectors, as many for every input of a side."""
        inputs = dict(features)
        slots = inputs.pop("slot_index")
        vectors = self.own["meta_tokens"][self._rows(task)]

        def write(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
            index = slots[:, :, None].expand(-1, -1, output.shape[-1])
            return output.scatter(1, index, vectors.to(output.dtype).expand_as(index))

        handle = self.backbone.get_input_embeddings().register_forward_hook(write)
        try:
            hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
        finally:
            handle.remove()
        own = slots[:, -(self.num_query if task == "query" else self.num_candidate) :, None]
        states = hidden.gather(1, own.expand(-1, -1, hidden.shape[-1])).float()
        if "projection" in self.own:
            states = states @ self.own["projection"].float().T
        found = nn.functional.normalize(states, dim=-1)
        mask = torch.ones(found.shape[:2], dtype=torch.long, device=found.device)
        return {**features, "token_embeddings": found, "attention_mask": mask}

    def get_embedding_dimension(self) -> int:
        """Width of a vector."""
        return self.settings["width"]

    def save(self, output_path: str, *_args: Any, **_kwargs: Any) -> None:
        """Writes the folder; sentence-transformers puts this file there."""
        folder = Path(output_path)
        self.backbone.save_pretrained(folder / "backbone")
        for part in (self.tokenizer, self.pictures):
            part.save_pretrained(folder / "processing")
        for name, value in zip(FILES, (self.settings, self.form), strict=False):
            (folder / name).write_text(json.dumps(value, indent=2) + "\n")
        own = {name: value.detach().contiguous() for name, value in self.own.items()}
        save_file(own, folder / FILES[2])
        (folder / BERT_CONFIG).write_text(json.dumps(bert_config(), indent=2) + "\n")

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        token: Any = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict | None = None,
        processor_kwargs: dict | None = None,
        config_kwargs: dict | None = None,
        backend: str = "torch",
        **_: Any,
    ) -> "MetaEmbed":
        """Loads a folder or a hub repository of it, as sentence-transformers asks for it."""
        if backend != "torch":
            raise ValueError(f"this model runs with backend='torch', not {backend!r}")
        here = {"token": token, "revision": revision, "local_files_only": local_files_only}
        files = [
            cls.load_file_path(model_name_or_path, file, cache_folder=cache_folder, **here)
            for file in FILES
        ]
        if None in files:
            raise FileNotFoundError(f"{model_name_or_path}: expected {', '.join(FILES)} in it")
        settings, form = (json.loads(Path(str(file)).read_text()) for file in files[:2])
        here["cache_dir"] = cache_folder
        options = {"dtype": settings["dtype"]} | (config_kwargs or {}) | (model_kwargs or {})
        if "torch_dtype" in options:
            options["dtype"] = options.pop("torch_dtype")
        backbone = AutoModel.from_pretrained(
            model_name_or_path, subfolder="backbone", **here, **options
        )
        of_processing = {"subfolder": "processing", **here, **(processor_kwargs or {})}
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **of_processing)
        pictures = AutoImageProcessor.from_pretrained(
            model_name_or_path, **({"backend": "pil"} | of_processing)
        )
        return cls(backbone, tokenizer, pictures, settings, form, load_file(str(files[2])))


def bert_config() -> dict[str, Any]:
    """Declares texts and pictures as inputs, for programs such as mteb."""
    taken = {"method": "forward", "method_output_name": "token_embeddings"}
    return {"modality_config": {"text": taken, "image": taken}}


def _parts(given: Any) -> tuple[str | None, Any]:
    """Text and picture of an input."""
    if isinstance(given, str):
        return given, None
    if not isinstance(given, dict):
        return None, given
    if given.keys() - {"text", "image"} or not any(given.values()):
        raise ValueError(f"expected a text, a picture or text and image, got {sorted(given)}")
    text = (given.get("text") or "").strip() or None
    return text, given.get("image")


def _upright(image: Any) -> Image.Image:
    """A picture as it is meant to be seen, in RGB and over white."""
    if not isinstance(image, Image.Image):
        image = Image.open(image)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
