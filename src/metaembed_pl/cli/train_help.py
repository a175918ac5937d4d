"""The help of `fit`, `validate` and `test`: short, and in the words of this package."""

import argparse

from jsonargparse import DefaultHelpFormatter

from metaembed_pl.cli import TRAINING_VERBS

USAGE = "metaembed-pl {} --config RECIPE [--KEY_OF_RECIPE VALUE ...]"
HELP = {  # instead of Lightning's; its other keys are not shown
    "config": "a recipe file, or the name of a built-in recipe; repeatable: later ones override",
    "print_config": "print the complete recipe",
    "seed_everything": "seed of new weights and dropout; true: a random one",
    "ckpt_path": "checkpoint to continue from, or to evaluate: a file, or `last`",
    "weights_only": argparse.SUPPRESS,
    "verbose": argparse.SUPPRESS,
    **dict.fromkeys(("model", "data", "run"), "YAML file of these keys"),
    "trainer": "YAML file of these keys; the other arguments of Lightning's Trainer are keys, too",
    "trainer.accelerator": "cpu, gpu, or auto: a GPU if there is one",
    "trainer.devices": "number of GPUs or processes on each machine",
    "trainer.num_nodes": "number of machines",
    "trainer.strategy": "auto, ddp, deepspeed_stage_2, deepspeed_stage_3 or fsdp2",
    "trainer.precision": "32-true; bf16-mixed: compute in bf16; bf16-true: weights in bf16, too",
    "trainer.max_steps": "number of training steps; -1: no limit",
    "trainer.max_epochs": "number of passes over the data, instead of max_steps",
    "trainer.max_time": "time limit, as DD:HH:MM:SS",
    "trainer.val_check_interval": "validate every so many steps; a share such as 0.5: of an epoch",
    "trainer.log_every_n_steps": "log every so many steps; null: 50",
    "trainer.gradient_clip_val": "largest norm of the gradient; null: any",
    "trainer.fast_dev_run": "try one step of training and validation, without saving",
}


class RecipeHelp(DefaultHelpFormatter):
    """Help without the types of Lightning's arguments, which fill a page."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.dest.startswith("trainer."):
            return f"{action.help} (default: %(default)s)"
        return super()._get_help_string(action)


def explain(parser: argparse.ArgumentParser, verb: str) -> None:
    """Replace Lightning's explanations of its verb and keys by ours."""
    parser.description = TRAINING_VERBS[verb]
    for action in parser._actions:
        name = action.dest
        if name.endswith(".help"):
            action.help = f"show the keys of {name.removesuffix('.help')}"
        if name.startswith("trainer.") or name in HELP:
            action.help = HELP.get(name, argparse.SUPPRESS)
