"""The wheel in an environment and a folder of its own: what users install is complete."""

import os
import subprocess
import sys
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with an environment that has the wheel, and its dependencies from this one.

    To install them anew would take minutes: `make test-wheel` does.
    """
    home = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(home), versions=["standard"])
    venv.create(home / "env", with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = home / "env" / "lib" / version / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # Appended, not inserted: of two that are called alike the wheel's comes first. A path file in
    # there, such as that of an editable install, is not read.
    dependencies = Path(pytest.__file__).parent.parent
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return home


def told(home: Path, *arguments: str) -> subprocess.CompletedProcess:
    known = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    return subprocess.run(
        [home / "env" / "bin" / "python", *arguments],
        cwd=home,
        env=known | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_wheel_says_what_it_is(installed):
    (wheel,) = installed.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = message_from_string(archive.read(metadata).decode())
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        entries = archive.read(points).decode()
    assert about["Requires-Python"] == ">=3.11"
    assert about["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in about.get_all("Classifier")
    assert "metaembed_pl/recipes/emoji.yaml" in names
    assert "metaembed_pl/py.typed" in names
    assert "metaembed_pl/model/sentence_transformers_module.py" in names
    assert not any(name.startswith(("tests/", "docs/")) for name in names)
    assert "metaembed = metaembed_pl.serving.vllm_plugin:register" in entries


def test_its_command_runs_outside_of_a_checkout(installed):
    where = told(installed, "-c", "import metaembed_pl; print(metaembed_pl.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed)
    listed = told(installed, "-m", "metaembed_pl", "recipes")
    assert listed.returncode == 0, listed.stderr
    assert "emoji" in listed.stdout
    shown = told(installed, "-m", "metaembed_pl", "recipes", "emoji")
    assert shown.stdout == (ROOT / "recipes" / "emoji.yaml").read_text()


def test_it_trains_from_a_recipe_that_it_brings(installed):
    recipe = told(installed, "-m", "metaembed_pl", "fit", "--config", "emoji", "--print_config")
    assert recipe.returncode == 0, recipe.stderr
    assert "groups:" in recipe.stdout


def test_its_scripts_can_be_imported(installed):
    where = told(installed, "-c", "from metaembed_pl.data_prep import pairs; print(pairs.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed), where.stderr
