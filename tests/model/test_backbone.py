import builtins
import functools
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import tiny
from metaembed_pl.errors import UserError
from metaembed_pl.model.backbone import (
    BackboneConfig,
    ScratchTokenizer,
    _texts,
    build_backbone,
    build_processing,
)
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.lora import LoraConfig, has_adapter
from metaembed_pl.model.processing import Prompt
from metaembed_pl.model.weights import load_backbone
from metaembed_pl.training.module import MetaEmbedModule

ITEMS = [{"text": "red apple"}, {"image": tiny.picture(1)}]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A tiny backbone with its processors, as the hub has them."""
    folder = tmp_path_factory.mktemp("hub") / "base"
    model = tiny.embedder()
    model.backbone.save_pretrained(folder)
    model.processing.save(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model folder, as `fit` leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "model"
    tiny.embedder(groups=("1x1", "2x4"), projection=16).save_pretrained(folder)
    return folder


def build(path: Path, **options):
    config = BackboneConfig(path=str(path), **options)
    return build_backbone(config, build_processing(config, Prompt()))


def start(folder: Path | str, **settings) -> MetaEmbedder:
    module = MetaEmbedModule(start_from=str(folder), **settings)
    module.configure_model()
    return module.embedder


def renamed(weights: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """The same weights under the names that others gave them."""
    if layout == "generative":  # Qwen3-VL-Embedding: the generative model, with or without a head
        found = {f"model.{name}": tensor for name, tensor in weights.items()}
        return found | {"lm_head.weight": torch.zeros(2, 2)}
    if layout == "old":  # GME and Qwen's first checkpoints: before `language_model` had its name
        return {name.replace("language_model.", "model."): t for name, t in weights.items()}
    # A wrapper that held the generative model as a part of itself.
    old = renamed(weights, "generative")
    return {f"{layout}.{name}": tensor for name, tensor in old.items()}


@pytest.mark.parametrize("layout", ["generative", "old", "base", "vlm"])
@pytest.mark.filterwarnings("ignore")
def test_weights_of_an_embedder_load_under_the_names_it_gave_them(pretrained, tmp_path, layout):
    model = AutoModel.from_pretrained(pretrained)
    model.config.save_pretrained(tmp_path)
    weights = renamed(model.state_dict(), layout)
    save_file(
        {name: tensor.clone() for name, tensor in weights.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    loaded = load_backbone(str(tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    loaded.save_pretrained(tmp_path / "again")
    again = load_backbone(str(tmp_path / "again")).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", ["generative", "base"])
@pytest.mark.filterwarnings("ignore")
def test_a_missing_weight_is_refused_under_whatever_name(pretrained, tmp_path, layout):
    model = AutoModel.from_pretrained(pretrained)
    model.config.save_pretrained(tmp_path)
    weights = renamed(model.state_dict(), layout)
    del weights[next(name for name in weights if "q_proj" in name)]
    save_file(
        {name: tensor.clone() for name, tensor in weights.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match=r"1 missing .*q_proj"):
        load_backbone(str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_has_no_place_is_refused(pretrained, tmp_path):
    for file in pretrained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(pretrained / "model.safetensors")
    save_file(
        weights | {"score.weight": torch.zeros(2, 2)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match=r"1 unexpected \(score\.weight\)"):
        load_backbone(str(tmp_path))


def test_starts_from_a_trained_model(trained):
    before = MetaEmbedder.from_pretrained(trained)
    module = MetaEmbedModule(start_from=str(trained), lora=LoraConfig(r=2))
    module.configure_model()
    after = module.embedder
    assert [str(group) for group in module.groups] == ["1x1", "2x4"]
    assert after.training
    assert has_adapter(after.backbone)
    assert torch.equal(after.encode_candidate(ITEMS), before.encode_candidate(ITEMS))


def test_starting_from_an_adapter_makes_it_part_of_the_weights(trained, tmp_path):
    first = start(trained, lora=LoraConfig(r=2, init="gaussian"))
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    first.save_pretrained(tmp_path / "first")
    expected = first.encode_candidate(ITEMS)
    for lora in (None, LoraConfig(r=3)):
        second = start(tmp_path / "first", lora=lora)
        torch.testing.assert_close(second.encode_candidate(ITEMS), expected, atol=1e-5, rtol=0)
        names = [name for name, p in second.named_parameters() if p.requires_grad]
        assert any("lora_A" in name for name in names) == (lora is not None)
        assert lora is not None or len(names) == len(list(second.named_parameters()))
        second.save_pretrained(tmp_path / "second", overwrite=True)
        loaded = MetaEmbedder.from_pretrained(tmp_path / "second")
        torch.testing.assert_close(loaded.encode_candidate(ITEMS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"groups": ["1x1"]},
            r"model\.groups is \['1x1'\], but start_from .* has \['1x1', '2x4'\]",
        ),
        ({"layout": "both"}, "model.layout is both, but start_from .* has own"),
        ({"projection": 8}, "model.projection is 8, but start_from .* has 16"),
        ({"prompt": Prompt(query="Find: ")}, "model.prompt is .* leave prompt out"),
        ({"backbone": BackboneConfig(path="x")}, "model.backbone.path is that of start_from"),
        ({"backbone": BackboneConfig(max_pixels=9)}, "model.backbone.max_pixels is that of"),
    ],
)
def test_another_model_than_the_one_to_start_from_is_refused(trained, given, message):
    with pytest.raises(UserError, match=message):
        MetaEmbedModule(start_from=str(trained), **given)


def test_what_a_recipe_repeats_and_how_the_backbone_is_run_may_be_given(trained):
    options = BackboneConfig(attention="eager", gradient_checkpointing=True)
    model = start(trained, groups=["1x1", "2x4"], layout="own", backbone=options)
    assert model.backbone.config._attn_implementation == "eager"
    assert model.backbone.visual.gradient_checkpointing


def hub_copy(trained: Path, folder: Path) -> Path:
    """Where the hub's client keeps a repository."""
    copy = folder / "models--org--name" / "snapshots" / COMMIT
    for file in (file for file in trained.rglob("*") if file.is_file()):
        target = copy / file.relative_to(trained)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return copy


def test_starts_from_the_hub_and_names_it_as_the_base(trained, tmp_path, monkeypatch):
    copy, asked = hub_copy(trained, tmp_path), []

    def download(repository, revision=None):
        asked.append((repository, revision))
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    start("org/name", lora=LoraConfig(r=2)).save_pretrained(tmp_path / "model")
    assert set(asked) == {("org/name", None)}
    settings = (tmp_path / "model" / "metaembed.json").read_text()
    assert '"path": "org/name/backbone"' in settings
    assert f'"revision": "{COMMIT}"' in settings


def test_a_hub_that_does_not_answer_is_one_line():
    with pytest.raises(UserError, match=r"org/name: no such folder here, and no such repository"):
        MetaEmbedder.from_pretrained("org/name")


def test_weights_come_back_in_the_precision_they_were_saved_in(tmp_path):
    tiny.embedder(projection=16).save_pretrained(tmp_path / "first")
    options = BackboneConfig(dtype="bfloat16")
    model = MetaEmbedder.from_pretrained(tmp_path / "first", options=options)
    model.save_pretrained(tmp_path / "model")
    loaded = MetaEmbedder.from_pretrained(tmp_path / "model")
    assert loaded.backbone.dtype == torch.bfloat16
    assert torch.equal(loaded.encode_query(ITEMS), model.encode_query(ITEMS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs either `path` or `scratch`"),
        ({"path": "x", "scratch": tiny.QWEN25_VL}, "not both"),
        ({"scratch": tiny.QWEN25_VL}, "needs a `tokenizer`"),
        ({"path": "nowhere"}, "nowhere: no tokenizer and image processor"),
        (
            {
                "scratch": tiny.QWEN25_VL,
                "tokenizer": ScratchTokenizer(300, []),
                "quantization": "nf4",
            },
            "quantization needs a pretrained backbone",
        ),
    ],
)
def test_a_faulty_backbone_is_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        build_processing(BackboneConfig(**settings), Prompt())


def test_nf4_needs_lora():
    with pytest.raises(UserError, match="nf4 freezes the weights: it needs `lora`"):
        MetaEmbedModule(BackboneConfig(path="x", quantization="nf4"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"attention": "flash_attention_2"}, "attention: flash_attention_2 needs .*a CUDA GPU"),
        ({"quantization": "nf4"}, "quantization: nf4 needs .*a CUDA GPU"),
        ({"liger": True}, "liger: true needs .*a CUDA GPU"),
    ],
)
def test_what_is_not_there_is_told_with_what_to_use_instead(pretrained, option, message):
    with pytest.raises(UserError, match=message + ", not available; use "):
        build(pretrained, **option)


def test_a_tokenizer_is_trained_on_remote_shards_as_well(tmp_path, monkeypatch):
    monkeypatch.setenv("METAEMBED_CACHE", str(tmp_path / "cache"))
    folder = tiny.shards(tmp_path / "shards", 2)
    assert [*_texts([f"file://{folder}"])] == [*_texts([str(folder)])]


def test_a_missing_package_is_named(pretrained, monkeypatch):
    real = builtins.__import__

    def no_liger(name, *args, **kwargs):
        if name.startswith("liger_kernel"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_liger)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        UserError, match=r"needs the package liger-kernel \(pip install .*liger\]\)"
    ):
        build(pretrained, liger=True)


@pytest.mark.parametrize("known", [True, False])
def test_liger_is_asked_for_no_head(pretrained, monkeypatch, known):
    """A stand-in for the package: its kernels need a GPU."""
    asked = {}
    patch = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2_5_vl": None} if known else {}
    patch._apply_liger_kernel_to_instance = lambda model, **given: asked.update(given)
    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if known:
        build(pretrained, liger=True)
        assert asked == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    else:
        with pytest.raises(UserError, match="no kernels for qwen2_5_vl"):
            build(pretrained, liger=True)


def test_compiled_layers_give_the_same_vectors_and_names(trained, monkeypatch):
    """With the compiler's front end alone: its back end takes half a minute."""
    plain = MetaEmbedder.from_pretrained(trained)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = MetaEmbedder.from_pretrained(trained, options=BackboneConfig(compile=True))
    layers = [m for m in compiled.backbone.modules() if m._compiled_call_impl is not None]
    assert len(layers) == tiny.QWEN25_VL["text_config"]["num_hidden_layers"]
    for items in (ITEMS, ITEMS[:1]):
        torch.testing.assert_close(
            compiled.encode_candidate(items), plain.encode_candidate(items), atol=1e-5, rtol=0
        )
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.filterwarnings("ignore")
def test_a_weight_of_another_shape_is_refused(pretrained, tmp_path):
    for file in pretrained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(pretrained / "model.safetensors")
    name = next(name for name in weights if "q_proj.weight" in name)
    weights[name] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 mis-shaped .*q_proj"):
        load_backbone(str(tmp_path))
