"""Where the recipes are: in the installed package, or beside the sources."""

from pathlib import Path

from metaembed_pl.errors import UserError


def recipe_folder() -> Path:
    """The folder of the recipes that come with the package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def with_recipes_found(argv: list[str]) -> list[str]:
    """Command-line arguments in which `--config NAME` of one of our recipes is its full path.

    Raises:
        UserError: no such file, and no recipe of that name.
    """
    found, is_config = [], False
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if is_config:
            argument = find_recipe(argument)
        elif flag in ("--config", "-c") and equals:
            argument = f"{flag}={find_recipe(value)}"
        is_config = argument in ("--config", "-c")
        found.append(argument)
    return found


def find_recipe(name: str) -> str:
    """A recipe's path: the file itself, or one of ours by name.

    Such as `emoji` or `recipes/emoji.yaml`.
    """
    if Path(name).is_file():  # a folder of data may well be called like a recipe
        return name
    folder = recipe_folder()
    for candidate in (folder / Path(name).name, folder / f"{name}.yaml"):
        if candidate.is_file():
            return str(candidate)
    ours = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise UserError(f"no recipe at {name}; recipes that come with the package: {ours}")
