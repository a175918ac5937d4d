"""The two ways through the house stay one-way: what imports what, read from the sources."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "metaembed_pl"
# From the top of the house to the bottom: a module imports from its own room or from rooms above.
ROOMS = (
    ("errors", "display", "files", "environment", "picture", "progress", "ranks", "samples"),
    ("item", "budget", "late_interaction_kernel", "late_interaction", "ranking"),
    ("data",),
    ("model",),
    ("training",),
    ("retrieval",),
    ("evaluation",),
    ("serving",),
    ("cli",),
)
APART = {"training", "retrieval", "evaluation"}
# Candidates of a benchmark are encoded into a store like any others, and evaluation, which stands
# below retrieval, reads that store: two ways of keeping vectors would differ one day.
OPEN = {"metaembed_pl.retrieval.store", "metaembed_pl.retrieval.embedding"}
# What takes longer to import than a light verb may take in all.
HEAVY = set(
    "deepspeed fastapi jsonargparse lightning matplotlib mlflow numpy peft PIL pyarrow pypdfium2 "
    "qdrant_client qdrant_edge rich starlette tokenizers torch torchmetrics transformers uvicorn "
    "webdataset".split()
)
MODULES = sorted(
    path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem[0] != "_"
)


def imports(tree):
    """What a file imports, wherever it does; of our modules with the name taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            ours = node.module.partition(".")[0] == "metaembed_pl"
            yield from (
                f"{node.module}.{alias.name}" if ours else node.module for alias in node.names
            )


def imports_at_once(path):
    """What importing a file imports: not inside functions, not what type checkers alone see."""
    waiting = list(ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ClassDef):
            waiting += node.body
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif not isinstance(node, ast.FunctionDef):
            yield from imports(node)


def room(module):
    """The part of `metaembed_pl.PART...`; None for what is outside of the package."""
    package, _, rest = module.partition(".")
    part = rest.partition(".")[0]
    return part if package == "metaembed_pl" and part != "__version__" else None


def floor(part):
    """How far down the house a part is."""
    floors = [floor for floor, parts in enumerate(ROOMS) if part in parts]
    assert floors, f"{part} has no place in ROOMS: give it one"
    return floors[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_from_rooms_above_only(path):
    own = path.relative_to(SOURCE).with_suffix("").parts[0]
    for module in imports(ast.parse(path.read_text())):
        other = room(module)
        if other is None or other == own:
            continue
        assert floor(other) <= floor(own), f"{own} is above {other}, and must not import {module}"
        may = own == "evaluation" and module.rpartition(".")[0] in OPEN
        assert may or not {own, other} <= APART, f"{own} and {other} stay apart: {module}"


def imports_of_files():
    """Each file with the files it imports at run time, also inside functions."""
    names = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in MODULES}
    found = {}
    for name, path in names.items():
        waiting, modules = list(ast.parse(path.read_text()).body), set()
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules.update(imports(node))
            waiting += ast.iter_child_nodes(node)
        ours = {module.partition(".")[2] for module in modules if room(module)}
        files = {part for module in ours for part in (module, module.rpartition(".")[0])}
        found[name] = files & names.keys()
    return found


def test_no_two_files_import_each_other():
    try:
        order = list(TopologicalSorter(imports_of_files()).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other in a circle: {' -> '.join(error.args[1])}")
    assert order.index("item") < order.index("data.shards") < order.index("cli.train")


def light_modules():
    """cli/main.py, the verbs that are not training, and all of ours that these import at once."""
    found, waiting = set(), [SOURCE / "cli" / "main.py", SOURCE / "cli" / "search.py"]
    waiting += [SOURCE / "cli" / name for name in ("embed.py", "push.py", "serve.py")]
    while waiting:
        path = waiting.pop()
        if path in found or not path.exists():
            continue
        found.add(path)
        for module in imports_at_once(path):
            package, *parts = module.split(".")
            if package == "metaembed_pl":
                # The last part may be a module or something in one: what is no file is skipped.
                places = [SOURCE.joinpath(*parts[:count]) for count in range(len(parts) + 1)]
                waiting += [place / "__init__.py" for place in places]
                waiting += [place.with_suffix(".py") for place in places[1:]]
    return sorted(found)


@pytest.mark.parametrize("path", light_modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_light_verbs_import_nothing_heavy(path):
    heavy = HEAVY & {module.partition(".")[0] for module in imports_at_once(path)}
    assert not heavy, f"import {', '.join(heavy)} where it is used: --help must answer at once"


def test_the_rules_have_something_to_check():
    assert len(MODULES) > 10
    names = {str(path.relative_to(SOURCE)) for path in light_modules()}
    assert {"cli/main.py", "cli/search.py", "errors.py", "__init__.py"} <= names


def test_documented_arguments_are_those_of_the_signature():
    """The documentation site refuses others."""
    wrong = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                known = parameters(node)
                _, _, after = (ast.get_docstring(node) or "").partition("Args:\n")
                listed = re.match(r"(?: {4}.*\n?)*", after)
                names = re.findall(r"(?m)^ {4}(\S[^:\n]*):", listed[0] if listed else "")
                wrong += [f"{file.name}:{node.name}: {name}" for name in names if name not in known]
    assert not wrong


def parameters(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """Of a function; of a class those of its methods, and its fields."""
    if isinstance(node, ast.FunctionDef):
        given = node.args
        all_of_it = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        return {argument.arg for argument in all_of_it if argument}
    fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
    methods = [parameters(part) for part in node.body if isinstance(part, ast.FunctionDef)]
    return {field.id for field in fields if isinstance(field, ast.Name)}.union(*methods)
