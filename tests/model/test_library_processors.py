"""Our tensors are those of transformers' own processors, given one user turn as a text."""

import copy

import pytest
import torch
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.mllama.processing_mllama import MllamaProcessor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

import tiny
from metaembed_pl.item import Item

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# The library's class, what its text has where the image belongs, and settings it reads from a file.
LIBRARY = {
    "qwen2_vl": (Qwen2VLProcessor, QWEN_IMAGE, {"video_processor": None}),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, QWEN_IMAGE, {"video_processor": None}),
    "qwen3_vl": (Qwen3VLProcessor, QWEN_IMAGE, {"video_processor": None}),
    "mllama": (MllamaProcessor, "<|image|>", {}),
    "paligemma": (PaliGemmaProcessor, "<image>", {}),
    "gemma3": (Gemma3Processor, "<start_of_image>", {"image_seq_length": 4}),
    "idefics3": (Idefics3Processor, "<image>", {"image_seq_len": 4}),
    # SmolVLM's own asks for a package that spells numbers (of video frames); for images it does as
    # Idefics3's.
    "smolvlm": (Idefics3Processor, "<image>", {"image_seq_len": 4}),
}
BY_TOKEN = ("input_ids", "attention_mask", "cross_attention_mask")
NAMED_TOKENS = {
    "mllama": {"bos_token": "<|begin_of_text|>"},
    "paligemma": {"bos_token": "<bos>"},
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
}
ITEMS = [
    Item("red apple", tiny.picture(1)),
    Item("moon", tiny.picture(2, (84, 56))),
    Item("blue flag", tiny.picture(3, (28, 140))),
]


def library_inputs(name, processing, item):
    """What transformers makes of the turn in which the query stands."""
    kind, placeholder, settings = LIBRARY[name]

    class ImageOnly(kind):
        """Without torchvision there is no video processor."""

        def check_argument_for_proper_class(self, *_):
            pass

    tokenizer = copy.deepcopy(processing.tokenizer)
    for role, token in NAMED_TOKENS.get(name, {}).items():
        setattr(tokenizer, role, token)
        setattr(tokenizer, f"{role}_id", tokenizer.convert_tokens_to_ids(token))
    processor = ImageOnly(
        image_processor=copy.deepcopy(processing.image_processor), tokenizer=tokenizer, **settings
    )
    words = processing.prompt
    turn = f"{words.prefix}{placeholder}{words.query}{item.text}{words.suffix}"
    if name == "paligemma":  # its processor puts the template's words in by itself
        turn = f"{placeholder}{words.query}{item.text}"
    return processor(
        images=[item.image], text=[turn], add_special_tokens=False, return_tensors="pt"
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's
@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.text)
def test_the_tensors_are_those_of_the_librarys_processor(name, item):
    processing = tiny.processing(tiny.CONFIGS[name])
    ours = processing.with_slots({"query": 2})([item], "query")
    library = library_inputs(name, processing, item)
    length = ours["input_ids"].shape[1] - 2
    assert library.keys() - ours.keys() <= {"labels"}
    assert ours.keys() - library.keys() <= {"slot_index", "image_rows"}
    for key in ours.keys() & library.keys():
        tensor = ours[key][:, :length] if key in BY_TOKEN or "token_type" in key else ours[key]
        assert torch.equal(tensor, library[key]), key
