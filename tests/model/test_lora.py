import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import tiny
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.backbone import BackboneConfig
from metaembed_pl.model.backbone_options import checkpoint_activations
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.lora import (
    LoraConfig,
    adapted_layers,
    has_adapter,
    merge_adapter,
    set_trainable,
)
from metaembed_pl.model.weights import fingerprint
from metaembed_pl.training.module import MetaEmbedModule

ITEMS = [
    Item("red apple"),
    Item(image=tiny.picture(1)),
    Item("blue flag moon star", image=tiny.picture(2, (84, 56))),
]
INITS = [{"init": "gaussian"}, {"init": "default"}, {"dora": True}]
FAMILIES = sorted(tiny.CONFIGS)


def awake(config: dict | None = None) -> MetaEmbedder:
    """A tiny embedder in which no part is shut off, as the gates of a new mllama are."""
    model = tiny.embedder(config=config)
    with torch.no_grad():
        for weight in model.backbone.parameters():
            if not weight.any():
                weight.normal_(std=0.1)
    return model


def adapted(config: dict | None = None, train_vision: bool = False, **lora) -> MetaEmbedder:
    """A tiny embedder with a LoRA adapter, on a backbone made in code."""
    model = awake(config)
    lora = LoraConfig(**{"r": 4, "alpha": 8, "dropout": 0.0} | lora)
    set_trainable(model.backbone, model.processing.family, lora, train_vision)
    return model


def loss(model: MetaEmbedder) -> torch.Tensor:
    """Something that every part of the model takes part in."""
    process = model.processor()
    queries = model(process(ITEMS, "query"), "query")
    candidates = model(process(ITEMS, "candidate"), "candidate")
    scores = torch.einsum("qid,cjd->qcij", queries, candidates).amax(-1).sum(-1)
    return torch.nn.functional.cross_entropy(scores * 10, torch.arange(len(ITEMS)))


def trained(model: MetaEmbedder, steps: int = 2) -> MetaEmbedder:
    """The model after some steps with a high learning rate."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return model.eval()


def vectors(model: MetaEmbedder) -> torch.Tensor:
    queries, candidates = model.encode_query(ITEMS), model.encode_candidate(ITEMS)
    return torch.cat([queries.flatten(), candidates.flatten()])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny pretrained model: what a hub id or a folder gives."""
    folder = tmp_path_factory.mktemp("hub") / "base"
    model = tiny.embedder()
    model.backbone.save_pretrained(folder)
    model.processing.save(folder)
    return folder


def on_base(base: Path, **lora) -> MetaEmbedder:
    """A new adapter on that model, as a recipe makes it."""
    torch.manual_seed(0)
    module = MetaEmbedModule(
        BackboneConfig(path=str(base), max_pixels=56 * 56),
        groups=["1x1", "2x4"],
        layout="own",
        lora=LoraConfig(**{"r": 4, "alpha": 8, "dropout": 0.0} | lora),
        train_vision=False,
    )
    module.configure_model()
    return module.embedder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_vision", [False, True])
def test_every_trainable_tensor_has_a_gradient_at_the_second_step(family, train_vision):
    model = trained(adapted(tiny.CONFIGS[family], train_vision), steps=1)
    model.zero_grad()
    loss(model).backward()
    still = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert not still


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_meta_tokens_alone_are_trained(family):
    config = tiny.CONFIGS[family]
    for train_vision in (False, True):
        model = adapted(config, train_vision)
        vision = model.processing.family.vision_module
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert all("lora_" in name or name == "meta_tokens.embedding.weight" for name in names)
        assert any(f"backbone.{vision}." in name for name in names) == train_vision
        assert len(adapted_layers(model.backbone)) >= 7


@pytest.mark.parametrize("family", FAMILIES)
def test_without_lora_train_vision_freezes_the_vision_tower_and_its_projector_alone(family):
    model = tiny.embedder(config=tiny.CONFIGS[family])
    row = model.processing.family
    set_trainable(model.backbone, row, None, train_vision=False)
    frozen = {name for name, p in model.backbone.named_parameters() if not p.requires_grad}
    towers = tuple(f"{m}." for m in (row.vision_module, row.projector_module) if m)
    assert frozen == {n for n, _ in model.backbone.named_parameters() if n.startswith(towers)}
    assert frozen


@pytest.mark.parametrize("lora", INITS, ids=str)
def test_a_new_adapter_changes_nothing(lora):
    plain = vectors(awake())
    torch.testing.assert_close(vectors(adapted(**lora).eval()), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", INITS, ids=str)
def test_a_trained_adapter_is_saved_and_loaded(base, tmp_path, lora):
    model = trained(on_base(base, **lora))
    assert not torch.allclose(vectors(model), vectors(on_base(base, **lora).eval()), atol=1e-3)
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "backbone").exists()
    loaded = MetaEmbedder.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(vectors(loaded), vectors(model), atol=0, rtol=0)


@pytest.mark.parametrize("lora", INITS, ids=str)
def test_a_merged_adapter_gives_the_same_vectors(base, lora):
    model = trained(on_base(base, **lora))
    before, names = vectors(model), {name for name, _ in tiny.embedder().named_parameters()}
    merge_adapter(model.backbone)
    assert not has_adapter(model.backbone)
    assert {name for name, _ in model.named_parameters()} == names
    torch.testing.assert_close(vectors(model), before, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("lora", INITS, ids=str)
def test_peft_reads_the_adapter_without_this_package(base, tmp_path, lora):
    model = trained(on_base(base, **lora))
    model.save_pretrained(tmp_path / "model")
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "model/adapter")
    batch = dict(model.processor()(ITEMS, "query"))
    batch.pop("slot_index")
    with torch.inference_mode():
        expected = model.backbone(**batch).last_hidden_state
        found = theirs.eval()(**batch).last_hidden_state
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=0)


def test_an_adapter_on_random_weights_brings_them_along(tmp_path):
    model = trained(adapted())
    model.save_pretrained(tmp_path / "model")
    loaded = MetaEmbedder.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(vectors(loaded), vectors(model), atol=1e-5, rtol=0)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "backbone").is_dir()


def test_a_base_model_on_disk_is_told_relative_to_the_model_folder(base, tmp_path):
    together = tmp_path / "together"
    together.mkdir()
    base.rename(together / "base")
    try:
        model = trained(on_base(together / "base"))
        model.save_pretrained(together / "model")
        told = json.loads((together / "model" / "metaembed.json").read_text())["backbone"]
        assert told["path"] == "../base"
        together.rename(tmp_path / "moved")
        loaded = MetaEmbedder.from_pretrained(tmp_path / "moved" / "model")
        assert torch.equal(vectors(loaded), vectors(model))
    finally:
        (tmp_path / "moved" / "base").rename(base)


def test_gradient_checkpointing_gives_an_adapter_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = adapted(train_vision=True)
        if checkpointing:
            checkpoint_activations(model.backbone)
        model.train()
        loss(model).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any("visual" in name and grad.any() for name, grad in grads[0].items())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_autocast_adapters_take_their_inputs_as_they_are(checkpointing):
    gradients, seen = [], []
    for casts in (None, True):
        model = adapted(train_vision=True)
        model.backbone.to(torch.bfloat16)
        for name, weight in model.named_parameters():
            weight.data = weight.data.float() if "lora_" in name else weight.data
        layers = list(adapted_layers(model.backbone).values())
        for layer in layers:
            layer.cast_input_dtype_enabled = casts or layer.cast_input_dtype_enabled
        if checkpointing:
            checkpoint_activations(model.backbone)
        model.train()
        hook = (
            layers[-1]
            .lora_A["default"]
            .register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].dtype))
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss(model).backward()
        hook.remove()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    half = len(seen) // 2
    assert set(seen[:half]) == {torch.bfloat16}
    assert set(seen[half:]) == {torch.float32}
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
    model.eval().encode_query(ITEMS)  # without autocast the adapter still casts: it is in fp32


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": "q_proj"}, r"'q_proj' matches no linear layer .* such as .*\.\w+"),
        ({"targets": "(q_proj"}, "'(q_proj' is not a valid regular expression"),
        ({"r": 0}, "lora.r and lora.alpha must be at least 1, got 0 and 8"),
        ({"dropout": 1.0}, "lora.dropout is a share"),
        (
            {"init": "pissa"},
            "lora.init must be gaussian or default, got 'pissa'; pissa was removed",
        ),
    ],
)
def test_a_faulty_lora_is_one_line(lora, message):
    import re

    pattern = message if "\\" in message else re.escape(message)
    with pytest.raises(UserError, match=pattern):
        adapted(**lora)


def _saved(base: Path, tmp_path: Path) -> Path:
    trained(on_base(base)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_refuses_an_adapter_with_a_missing_tensor(base, tmp_path):
    folder = _saved(base, tmp_path)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"1 missing .*lora_B"):
        MetaEmbedder.from_pretrained(folder)


def test_refuses_an_adapter_for_other_weights(base, tmp_path):
    folder = _saved(base, tmp_path)
    tiny.embedder(seed=1).backbone.save_pretrained(tmp_path / "other")
    settings = json.loads((folder / "metaembed.json").read_text())
    settings["backbone"]["path"] = "../other"
    (folder / "metaembed.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"trained on other weights than \.\./other has now"):
        MetaEmbedder.from_pretrained(folder)


def test_refuses_an_adapter_for_another_architecture(base, tmp_path):
    folder = _saved(base, tmp_path)
    file = folder / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"target_modules": r".*\.query_key_value"}
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter for another base model.*query_key_value"):
        MetaEmbedder.from_pretrained(folder)


def test_refuses_an_adapter_of_another_rank(base, tmp_path):
    folder = _saved(base, tmp_path)
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 2}))
    with pytest.raises(UserError, match="mis-shaped"):
        MetaEmbedder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("adapter/adapter_config.json", "not a readable LoRA adapter"),
        ("adapter/adapter_model.safetensors", "not a readable safetensors file"),
        ("adapter", "has no adapter/"),
    ],
)
def test_refuses_a_folder_without_its_adapter(base, tmp_path, gone, message):
    folder = _saved(base, tmp_path)
    (folder / gone).rename(tmp_path / "gone")
    with pytest.raises(UserError, match=message):
        MetaEmbedder.from_pretrained(folder)


def test_refuses_a_folder_whose_base_model_is_gone(base, tmp_path):
    folder = _saved(base, tmp_path)
    base.rename(tmp_path / "away")
    try:
        with pytest.raises(UserError, match="not there; bring it back"):
            MetaEmbedder.from_pretrained(folder)
    finally:
        (tmp_path / "away").rename(base)


def test_a_fingerprint_is_of_the_weights_whatever_they_are_kept_in():
    backbone = tiny.embedder().backbone
    half = tiny.embedder().backbone.to(torch.bfloat16)
    # What bf16 cannot hold is no difference: it is how such weights are loaded either way.
    assert fingerprint(half) == fingerprint(half.float()) == fingerprint(backbone)
    assert fingerprint(tiny.embedder(seed=1).backbone) != fingerprint(backbone)
    assert fingerprint(tiny.embedder().backbone.to(torch.float16)) is None
    assert fingerprint(tiny.embedder().backbone.to("meta")) is None
