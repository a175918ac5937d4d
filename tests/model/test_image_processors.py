"""Our patches of pictures against transformers', bit by bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as library

import tiny
from metaembed_pl.model.image_processors import Qwen2VLImageProcessorPil

SIDES = st.integers(1, 150)
SETTINGS = [
    {},
    {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 84}, "temporal_patch_size": 1},
    {"rescale_factor": 1 / 127.5, "resample": Image.Resampling.LANCZOS, "merge_size": 1},
]


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3), kind=st.sampled_from(SETTINGS)
)
def test_the_patches_are_transformers_to_the_last_bit(sizes, kind):
    pictures = [[tiny.picture(seed, size)] for seed, size in enumerate(sizes)]
    ours = Qwen2VLImageProcessorPil(**kind)(images=pictures, return_tensors="pt")
    theirs = library.Qwen2VLImageProcessorPil(**kind)(images=pictures, return_tensors="pt")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


@pytest.mark.parametrize(
    ("change", "pictures"),
    [
        ({"do_normalize": False}, [tiny.picture(0)]),
        ({"do_rescale": False}, [tiny.picture(0)]),
        ({}, [tiny.picture(0).convert("L")]),
        ({}, [np.asarray(tiny.picture(0))]),
    ],
)
def test_what_is_unusual_is_left_to_transformers(change, pictures):
    kinds = (Qwen2VLImageProcessorPil, library.Qwen2VLImageProcessorPil)
    ours, theirs = (kind(**change)(images=pictures, return_tensors="pt") for kind in kinds)
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_a_model_folder_names_the_librarys_class(tmp_path):
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    loaded = library.Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    saved = loaded.to_dict()["image_processor_type"]
    assert saved == Qwen2VLImageProcessorPil().to_dict()["image_processor_type"]
    assert saved == "Qwen2VLImageProcessor"
