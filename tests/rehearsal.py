"""All that a user of a paper recipe does, on this machine: the files' real layouts, tiny contents.

    python tests/rehearsal.py             # all the paper's recipes, some minutes
    python tests/rehearsal.py qwen7b      # one of them

data_prep on a copy of the datasets in the hub's layout; a model folder as the hub has it (its own
config but for the sizes, its names of weights in several files, random values); `check`; `fit` over
two processes, killed by SIGKILL and resumed; `test`; `export` in its three forms; and what was
exported loaded in fresh processes, after everything else has gone: by us, by plain transformers and
by sentence-transformers. What this cannot show: docs/scale.md.

Tokenizers are trained on a few words, but for families whose own one an installed package has
(pip install --no-deps dashscope llama-models: Qwen's, Llama 3's).
"""

import base64
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import tiny
from ranks import Ranks, command_line

ROOT = Path(__file__).parents[1]
PAPER = ("qwen3b", "qwen7b", "qwen32b", "llama11b", "paligemma3b", "qwen3vl8b")
OTHERS = ("qwen3b_single", "qwen3b_no_mmr", "qwen7b_single", "moca_like", "mme5_like")
RECIPES = (*PAPER, *OTHERS)
NUM_ROWS = 20  # of each of the 27 sources
ITEMS = [{"text": "red apple"}, {"image": "seen.png"}, {"text": "small tree", "image": "seen.png"}]


def rehearse(name: str, copy: Path, work: Path, say: Callable[[str], Any] = print) -> list[str]:
    """Goes through a recipe in an empty folder; returns the steps.

    Args:
        name: of the recipe.
        copy: what `write_datasets` has written.
        work: the empty folder.
        say: gets a line a step.

    Raises:
        AssertionError: a step did not do what a user relies on; it has the step's output.
    """
    steps: list[str] = []
    start = time.perf_counter()

    def done(step: str) -> None:
        steps.append(step)
        say(f"{name}: {step}, {time.perf_counter() - start:.0f} s")

    user = User(work)
    user.prepares_data(copy)
    done("data_prep")
    write_hub_model(name, work / "hub" / "model")
    done("hub folder")
    flags = ["--config", name, *overrides(name)]
    told = user.runs("check", *flags, "--gpus", "2")
    assert "fault" not in told, told
    done("check")
    user.is_killed("fit", *flags, once_there=work / f"runs/{name}/checkpoints/last.ckpt")
    done("fit, killed")
    user.runs("fit", *flags, "--ckpt_path", "last", on=2)
    assert (work / "runs" / name / "model" / "metaembed.json").is_file()
    done("fit, resumed")
    user.runs("test", *flags, "--ckpt_path", "last", on=2)
    metrics = json.loads((work / "runs" / name / "report" / "metrics.json").read_text())
    assert any(key.startswith("test/paper_val/recall@1/") for key in metrics), metrics
    done("test")
    elsewhere = work.parent / f"{work.name}-elsewhere"
    elsewhere.mkdir()
    tiny.picture(1).save(work / "seen.png")
    expected = user.encodes(f"runs/{name}/model", elsewhere / "expected.pt")
    for form in FORMATS:
        export = ("export", "--run", f"runs/{name}", "--out", f"out/{form}", "--format", form)
        user.runs(*export, "--merge")
    done("export")
    for wanted in ("out", "seen.png"):
        shutil.move(str(work / wanted), elsewhere / wanted)
    shutil.rmtree(work)
    for form, found in loaded_elsewhere(elsewhere).items():
        assert_alike(found, expected, form)
    done("loaded elsewhere")
    return steps


class User:
    """Who types commands in a folder, where they run as processes forked from one that is ready.

    Args:
        folder: where they are typed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._number = 0

    def _said(self) -> Path:
        self._number += 1
        return self.folder / "said" / str(self._number)

    def runs(self, *arguments: str, on: int = 1) -> str:
        """`metaembed-pl ARGUMENTS`, on one process or several; what the first one said."""
        started = command_line(on, self._said(), *arguments, first=partial(os.chdir, self.folder))
        ended = started.end()
        assert all(status == 0 for status, _ in ended), f"{arguments}: {ended}"
        return ended[0][1]

    def is_killed(self, *arguments: str, once_there: Path) -> None:
        """The same on two processes, which are killed as soon as a file is there."""
        started = command_line(2, self._said(), *arguments, first=partial(os.chdir, self.folder))
        first = started.processes[0]
        while first.exitcode is None and not once_there.exists():
            time.sleep(0.02)
        started.kill()
        ended = started.end()
        assert all(status == -signal.SIGKILL for status, _ in ended), ended

    def prepares_data(self, copy: Path) -> None:
        """`python data_prep/moca_pairs.py`."""
        (ended,) = Ranks(1, self._said(), prepare_data, str(self.folder), str(copy)).end()
        assert ended[0] == 0, ended[1]

    def encodes(self, model: str, out: Path) -> Any:
        """Meta embeddings of the items by our own code, in a process of its own."""
        import torch

        arguments = str(self.folder), model, str(out)
        (ended,) = Ranks(1, self._said(), encode, *arguments).end()
        assert ended[0] == 0, ended[1]
        return torch.load(out)


def prepare_data(_rank: int, folder: str, copy: str) -> None:
    """Shards of all sources, and of what is held out of them, in a folder."""
    os.chdir(folder)
    flags = ["--from", copy, "--images", f"{copy}/images", "--hold-out", "4", "--num-workers", "0"]
    sys.exit(importlib.import_module("metaembed_pl.data_prep.moca_pairs").main(flags))


def overrides(name: str) -> list[str]:
    """What a rehearsal changes of a recipe: where the model is, the machine, how long it runs."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    flags: dict[str, Any] = {
        "model.backbone.path": "hub/model",
        "model.backbone.dtype": "float32",
        "data.global_batch_size": 4,
        "data.test": json.dumps(recipe["data"]["val"]),
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.precision": "32-true",
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "run.checkpoint_every_n_steps": 2,
    }
    if "max_pixels" in recipe["model"]["backbone"]:
        flags |= {"model.backbone.max_pixels": 64 * 64, "model.backbone.min_pixels": 32 * 32}
    return [f"--{key}={value}" for key, value in flags.items()]


# Each is run in a fresh process, one after the other: of the first nothing but transformers is
# needed. It has the words of docs/export.md for Qwen; of other families, all weights are read.
PROGRAMS = {
    "transformers": """
import re
from pathlib import Path
import torch
from transformers import AutoModel
folder = "out/transformers"
code = re.findall(r"```python\\n(.*?)```", Path(page).read_text(), re.DOTALL)
code = next(part for part in code if "def embed" in part).partition("\\nquery = ")[0]
if json.loads(Path(folder, "config.json").read_text())["model_type"].startswith("qwen"):
    exec(code.replace('"custom"', repr(folder)))
    shown = [{k: v if k == "text" else Image.open(v) for k, v in i.items()} for i in items]
    found = [[embed(side, **item) for item in shown] for side in ("query", "candidate")]
else:
    told = AutoModel.from_pretrained(folder, output_loading_info=True)[1]
    assert not told["missing_keys"] and not told["mismatched_keys"], told
    found = None
assert "metaembed_pl" not in sys.modules
""",
    "sentence-transformers": """
from sentence_transformers import MultiVectorEncoder
model = MultiVectorEncoder("out/sentence-transformers", trust_remote_code=True, device="cpu")
found = [model.encode_query(items), model.encode_document(items)]
""",
    "metaembed": """
from metaembed_pl import MetaEmbedder
model = MetaEmbedder.from_pretrained("out/metaembed")
found = [model.encode_query(items), model.encode_candidate(items)]
""",
}
FORMATS = tuple(PROGRAMS)


def encode(_rank: int, folder: str, model: str, out: str) -> None:
    """Meta embeddings of the items as queries and as candidates, to a file."""
    import torch

    from metaembed_pl import MetaEmbedder

    os.chdir(folder)
    loaded = MetaEmbedder.from_pretrained(model)
    torch.save([loaded.encode_query(ITEMS), loaded.encode_candidate(ITEMS)], out)


def loaded_elsewhere(folder: Path) -> dict[str, Any]:
    """The same by every exported form, in a process that has nothing but the folder."""
    page = str(ROOT / "docs" / "export.md")
    lines = ["import json, sys", f"items, page, all_found = {ITEMS!r}, {page!r}, {{}}"]
    for form, program in PROGRAMS.items():
        keep = "found and [torch.stack(list(side)).tolist() for side in found]"
        lines += [program, f"all_found[{form!r}] = {keep}"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, "print(json.dumps(all_found))"])],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_alike(found: Any, expected: Any, form: str) -> None:
    """Fails where a vector is not the one that it was in training."""
    import torch

    if found is None:
        return
    for theirs, ours in zip(found, expected, strict=True):
        cosines = torch.nn.functional.cosine_similarity(torch.tensor(theirs), ours, dim=-1)
        assert cosines.min() > 0.9999, f"{form}: {cosines}"


def write_datasets(copy: Path) -> None:
    """All 27 sources in the layouts of their hub repositories, below one folder."""
    import hub

    moca = importlib.import_module("metaembed_pl.data_prep.moca_pairs")
    archives: dict[tuple[str, ...], dict[str, bytes]] = {}
    for subset in moca.FOLDERS:
        _, files, below = moca.ARCHIVES.get(subset, ("", (), ""))
        home = below or subset
        pictures = {f"{home}/{i}.png": hub.png(i) for i in range(4)}
        rows = [
            {
                "qry": f"what is this, {number} of {subset}?",
                "qry_image_path": f"images/{home}/{number % 4}.png" if number % 2 else "",
                "pos_text": f"answer {number}",
                "pos_image_path": f"images/{home}/{(number + 1) % 4}.png",
                "neg_text": [f"no {number}"],
                "neg_image_path": [""],
            }
            for number in range(NUM_ROWS)
        ]
        hub.write_parquet(copy / subset / "train-00000-of-00001.parquet", rows)
        if files:
            archives.setdefault(tuple(files), {}).update(pictures)
        else:
            hub.write_zip(copy / "images" / "images_zip" / f"{subset}.zip", pictures)
    for files, content in archives.items():
        packed = hub.tar_gz(content)
        size = -(-len(packed) // len(files))
        for number, file in enumerate(files):
            path = copy / "images" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(packed[number * size : (number + 1) * size])


def write_hub_model(name: str, folder: Path) -> None:
    """A model as the hub has it: its own config but for sizes, its names of weights, in parts."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    published = ROOT / "recipes" / "configs" / recipe["model"]["backbone"]["path"]
    values, pictures = (
        json.loads((published / f"{kind}config.json").read_text()) for kind in ("", "preprocessor_")
    )
    small = tiny.CONFIGS[values["model_type"]]
    kept = ("patch_size", "spatial_merge_size", "temporal_patch_size", "window_size")
    for part in ("text_config", "vision_config"):
        real = values.get(part, {})
        values[part] = real | small[part] | {k: real[k] for k in kept if k in real}
    values |= {k: v for k, v in small.items() if k not in ("text_config", "vision_config")}
    folder.mkdir(parents=True)
    write_tokenizer(values, folder)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**values))
    with redirect_stdout(io.StringIO()):
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    if values["model_type"] == "paligemma":
        rename(folder, "vision_tower.", "vision_tower.vision_model.")
    values |= {"torch_dtype": "bfloat16", "transformers_version": "4.41.2"}
    if values["model_type"] == "qwen2_5_vl":
        values, pictures = as_qwen25_has_it(values, pictures)
    elif "image_size" in values["vision_config"]:
        side = values["vision_config"]["image_size"]
        pictures["size"] = {"height": side, "width": side}
        if "image_seq_length" in pictures:
            pictures["image_seq_length"] = (side // values["vision_config"]["patch_size"]) ** 2
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))


def rename(folder: Path, old: str, new: str) -> None:
    """Other names of weights, in all files and in their index."""
    from safetensors.torch import load_file, save_file

    def named(values: dict[str, Any]) -> dict[str, Any]:
        return {re.sub(f"^{re.escape(old)}", new, key): value for key, value in values.items()}

    for file in folder.glob("*.safetensors"):
        save_file(named(load_file(file)), file, {"format": "pt"})
    for index in folder.glob("*.index.json"):
        content = json.loads(index.read_text())
        index.write_text(json.dumps(content | {"weight_map": named(content["weight_map"])}))


def as_qwen25_has_it(
    values: dict[str, Any], pictures: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its files on the hub are older than the library: one level, and limits of its own."""
    text = dict(values.pop("text_config"))
    rope = text.pop("rope_parameters")
    text.pop("model_type", None)
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    values |= text | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    limits = pictures.pop("size")
    pictures |= {"min_pixels": limits["shortest_edge"], "max_pixels": limits["longest_edge"]}
    return values, pictures | {"processor_class": "Qwen2_5_VLProcessor"}


def write_tokenizer(values: dict[str, Any], folder: Path) -> None:
    """The family's own tokenizer where a package has it, or a small one; the config's ids of it."""
    from metaembed_pl.model.family import family_of

    family = family_of(values["model_type"])
    own = own_tokenizer(values["model_type"])
    if own is not None:
        own.save_pretrained(folder)
        return
    tokenizer = tiny.processing(tiny.CONFIGS[family.model_type]).tokenizer
    tokenizer.save_pretrained(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for token, name in family.special_tokens}
    values |= {name: number for name, number in ids.items() if name}
    # Rows that no word uses, as the hub's models have them.
    values["text_config"] |= {"vocab_size": len(tokenizer) + 96}
    values["text_config"] |= dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id"), tokenizer.pad_token_id
    )
    values |= {k: 0 for k in ("pad_token_id", "bos_token_id", "eos_token_id") if k in values}


QWEN_WORDS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
LLAMA_WORDS = (
    "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> "
    "<|finetune_right_pad_id|> <|step_id|> <|start_header_id|> <|end_header_id|> <|eom_id|> "
    "<|eot_id|> <|python_tag|>"
).split() + [f"<|reserved_special_token_{i}|>" for i in range(2, 247)]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The package that has a family's ranks of byte pairs, the file, digits in a word, special words.
OWN = {
    "qwen": ("dashscope", "resources/qwen.tiktoken", "", QWEN_WORDS),
    "mllama": ("llama_models", "llama3/tokenizer.model", "{1,3}", [*LLAMA_WORDS, "<|image|>"]),
}


def own_tokenizer(model_type: str) -> Any:
    """The tokenizer of a family's models on the hub, from a package's file; None: no such package.

    The file has a byte pair and its rank a line; the special words have the ids after them.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if (of_family := re.match("|".join(OWN), model_type)) is None:
        return None
    package, file, digits, special = OWN[of_family[0]]
    if (found := importlib.util.find_spec(package)) is None or found.origin is None:
        return None
    lines = (Path(found.origin).parent / file).read_text().splitlines()
    ranks = {base64.b64decode(word): int(rank) for word, rank in map(str.split, lines)}
    letters = bytes_to_unicode()

    def written(word: bytes) -> str:
        return "".join(letters[byte] for byte in word)

    merges = [
        (max(ranks[left], ranks[right]), rank, left, right)
        for word, rank in ranks.items()
        for left, right in ((word[:i], word[i:]) for i in range(1, len(word)))
        if left in ranks and right in ranks
    ]
    merges.sort(key=lambda merge: (merge[1], merge[0]))
    pairs = [(written(left), written(right)) for *_, left, right in merges]
    vocabulary = {written(word): rank for word, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN % digits), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    pad = "<|finetune_right_pad_id|>" if package == "llama_models" else "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=pad)


def main(names: list[str]) -> None:
    """Goes through recipes, one after the other."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        write_datasets(copy)
        for name in names or RECIPES:
            work = Path(place) / name
            work.mkdir()
            rehearse(name, copy, work)


if __name__ == "__main__":
    main(sys.argv[1:])
