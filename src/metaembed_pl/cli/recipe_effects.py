"""Keys of a recipe that would have no effect beside its other keys."""

from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

from metaembed_pl.training.optimizer import OptimizerConfig, optimizer_class

EXPERIMENT = "metaembed"
Rule = tuple[bool, str, str]
"""Whether a key is ignored, the key, and the reason."""


def keys_without_effect(recipe: Any) -> list[str]:
    """A line for each key of a parsed recipe that `fit` would ignore."""
    always = "it is always true, so that a checkpoint cannot run code"
    rules = [(recipe.weights_only is False, "weights_only", always)]
    if not recipe.ckpt_path:  # a run that resumes keeps its recipe
        model = recipe.model
        rules += [*_of_backbone(model.backbone or {}), *_of_model(model, bool(recipe.data.val))]
        rules += [*_of_optimizer(model.optimizer), *_of_run(recipe.trainer, recipe.run)]
    return [f"{key} has no effect: {why}" for is_ignored, key, why in rules if is_ignored]


def _of_backbone(backbone: Any) -> Iterator[Rule]:
    given = {key for key in ("scratch", "tokenizer", "revision") if backbone.get(key) is not None}
    is_scratch, path = "scratch" in given, backbone.get("path")
    dtype, why = backbone.get("dtype"), "it is for pretrained weights, not for `scratch`"
    yield is_scratch and dtype != "float32", "model.backbone.dtype", why
    why = "it is for `scratch`; a pretrained model has its own"
    yield not is_scratch and "tokenizer" in given, "model.backbone.tokenizer", why
    is_here = path is None or Path(path).exists()
    yield is_here and "revision" in given, "model.backbone.revision", "it is for a hub id as `path`"


def _of_model(model: Any, validates: bool) -> Iterator[Rule]:
    is_pooled, why = (
        model.pooling in ("last", "mean"),
        f"pooling {model.pooling} has no meta tokens",
    )
    for key in ("layout", "meta_token_std", "meta_tokens_orthogonal", "optimizer.meta_token_lr"):
        yield is_pooled and model.get(key) not in (None, False), f"model.{key}", why
    chooses = bool(model.lora and model.lora.targets)
    why = "lora.targets chooses the layers"
    yield chooses and not model.train_vision, "model.train_vision", why
    why = "it selects the best checkpoint by data.val, which has no sources"
    yield model.headline is not None and not validates, "model.headline", why


def _of_optimizer(given: Any) -> Iterator[Rule]:
    optimizer = OptimizerConfig(**(given.as_dict() if given else {}))
    takes = signature(optimizer_class(optimizer)).parameters
    for key in ("betas", "weight_decay"):
        is_changed = getattr(optimizer, key) != getattr(OptimizerConfig, key)
        why = f"{optimizer.kind} does not take it"
        yield is_changed and key not in takes, f"model.optimizer.{key}", why
    key, why = "model.optimizer.options.weight_decay", "model.optimizer.weight_decay is used"
    yield "weight_decay" in optimizer.options, key, why


def _of_run(trainer: Any, run: Any) -> Iterator[Rule]:
    why = "the folder of a run is run.folder/run.name"
    yield bool(trainer.default_root_dir), "trainer.default_root_dir", why
    why = "`check` shows the parameters"
    yield bool(trainer.enable_model_summary), "trainer.enable_model_summary", why
    is_changed = trainer.check_val_every_n_epoch not in (1, None)
    why = "an integer val_check_interval counts steps of the run"
    counts = isinstance(trainer.val_check_interval, int)
    yield counts and is_changed, "trainer.check_val_every_n_epoch", why
    is_unused = run.mlflow_uri is None and run.experiment != EXPERIMENT
    yield is_unused, "run.experiment", "run.mlflow_uri is null"
