"""Documentation: links lead somewhere, code runs, quoted messages are those of the code."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

import tiny
from metaembed_pl.cli import TRAINING_VERBS, VERBS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
GENERATED = re.findall(r'"([\w/-]+\.md)": ', (ROOT / "docs/generate.py").read_text())
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page):
    """The anchors of a page's headings, as Markdown renderers make them."""
    heads = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@by_name
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        path, _, anchor = target.partition("#")
        if "://" in target or path in GENERATED:
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@by_name
def test_pages_that_are_named_exist(page):
    for name in re.findall(r"docs/([\w-]+\.md)", page.read_text()):
        assert (ROOT / "docs" / name).exists(), name


def test_the_menu_has_every_page():
    class Loader(yaml.SafeLoader):
        pass

    menu = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]

    def pages(entries):
        for entry in entries:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else pages(value)

    listed = set(pages(menu))
    assert listed == {page.name for page in ROOT.glob("docs/*.md")} - {"log.md"} | set(GENERATED)


def names_in(file):
    """Functions, classes and `Class.method` that a source file defines."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            inner = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            yield from (f"{node.name}.{part.name}" for part in inner)


def test_names_in_the_reading_guide_exist():
    text, source = (ROOT / "docs/reading.md").read_text(), ROOT / "src/metaembed_pl"
    files = re.findall(r"`([\w/]+\.py)`", text)
    assert len(files) > 20
    assert [file for file in files if not (source / file).is_file()] == []
    steps = re.findall(r"\*\*`([\w/]+\.py)`\*\*, `([\w.]+)`", text)
    assert len(steps) > 10
    assert [step for step in steps if step[1] not in names_in(source / step[0])] == []
    # Methods without their class, too; a module or a verb may be named like a function.
    known = {name for file in source.rglob("*.py") for name in (file.stem, *names_in(file))}
    known |= {name.rpartition(".")[2] for name in known} | {*TRAINING_VERBS, *VERBS}
    named = {name for name in re.findall(r"`([A-Za-z_][\w.]*)`", text) if name[-3:] != ".py"}
    assert named - known == set()


def test_messages_in_troubleshooting_are_those_of_the_code():
    said = re.findall(r"^\| (`.*?`(?: \.\.\. `.*?`)*) \|", troubleshooting(), re.M)
    sources = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in (ROOT / "src").rglob("*.py")
    )
    parts = [part for message in said for part in re.findall(r"`(.*?)`", message)]
    assert len(parts) > 15
    assert [part for part in parts if part not in sources] == []


def troubleshooting():
    return (ROOT / "docs/troubleshooting.md").read_text()


def arguments(parser):
    """All arguments of a parser and of its own verbs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from arguments(verb)
        else:
            yield action


def flags(parser):
    """All flags of a parser and of its own verbs."""
    return {flag for action in arguments(parser) for flag in action.option_strings}


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_argument_and_says_its_default(verb):
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"metaembed_pl.cli.{verb}").add_arguments(parser)
    for action in arguments(parser):
        assert action.help, action.dest
        has_default = action.default not in (None, False, [], argparse.SUPPRESS)
        assert not has_default or "default: " in action.help, action.dest


def commands(page):
    """Commands of this package in a page's shell blocks, as lists of words."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:-m metaembed_pl|metaembed-pl) ([a-z]+) ?(.*)", line)
            if found:
                rest = re.split(r"\s#|\|\||&&|;| \| ", found[2])[0]
                yield found[1], re.findall(r"(?<!\S)--[a-z][\w-]*", rest), line


@by_name
def test_commands_have_verbs_and_flags_that_exist(page):
    for verb, given, line in commands(page):
        assert verb in {*VERBS, *TRAINING_VERBS}, line
        if verb in TRAINING_VERBS or verb == "check":
            continue
        if verb == "prepare":  # its flags are those of the script
            name = re.search(r"prepare (\w+)", line)
            files = ["_source.py", f"{name[1]}.py"] if name else []
            source = "".join((ROOT / "data_prep" / file).read_text() for file in files)
            assert [flag for flag in given if f'"{flag}"' not in source] == [], line
            continue
        parser = argparse.ArgumentParser()
        importlib.import_module(f"metaembed_pl.cli.{verb}").add_arguments(parser)
        known = {*flags(parser), "--debug"}
        assert set(given) <= known, line


@by_name
def test_python_blocks_compile(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, str(page), "exec")
        for module, names in re.findall(
            r"^from metaembed_pl([\w.]*) import ([\w, ]+)", block, re.M
        ):
            path = ROOT / "src/metaembed_pl" / module.lstrip(".").replace(".", "/")
            source = (
                path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            ).read_text()
            for name in names.replace(" ", "").split(","):
                assert re.search(rf"\b{name}\b", source), (module, name)


def test_the_python_reference_has_what_pages_import():
    source = (ROOT / "docs/generate.py").read_text()
    named = set(re.findall(r'"((?:[a-z_]+\.)+[A-Za-z_]+)"', source[: source.index("def on_files")]))
    for name in named:
        module, _, thing = name.rpartition(".")
        file = ROOT / "src/metaembed_pl" / (module.replace(".", "/") + ".py")
        assert re.search(rf"\b{thing}\b", file.read_text()), name
    things = {name.rpartition(".")[2] for name in named}
    for page in ROOT.glob("docs/*.md"):
        for names in re.findall(
            r"^from metaembed_pl[\w.]* import ([\w, ]+)", page.read_text(), re.M
        ):
            assert {*names.replace(" ", "").split(",")} <= things, page.name


def test_the_first_example_runs(tmp_path, monkeypatch):
    tiny.embedder().save_pretrained(tmp_path / "runs/emoji/model")
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/index.md").read_text(), re.DOTALL)
    names = {}
    exec(block, names)
    assert names["model"].score(names["queries"], names["candidates"], "4x8").shape == (1, 1)


@by_name
def test_yaml_blocks_parse(page):
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        list(yaml.safe_load_all(block))


@by_name
def test_shell_blocks_can_be_split_into_words(page):
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        if "<<" not in block:
            shlex.split(block, comments=True)
