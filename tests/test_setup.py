"""The environment is described once: lock, conda file and pyproject agree, and are installed."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import textwrap
import tomllib
from importlib.metadata import PackageNotFoundError, version

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOT_LOCKED = {"bench", "book", "ui"}
NEEDED = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *(v for k, v in EXTRAS.items() if k not in NOT_LOCKED))
    for line in lines
]


def lines(text: str) -> list[str]:
    stripped = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in stripped if line]


def pins() -> dict[str, str]:
    """requirements.lock as {canonical name: version}."""
    locked = {}
    for line in lines((ROOT / "requirements.lock").read_text()):
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"requirements.lock: {line!r} is not a plain name==version"
        name = canonicalize_name(match[1])
        assert name not in locked, f"requirements.lock: {name} twice"
        locked[name] = match[2]
    return locked


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda r: r.name)
def test_the_lock_satisfies_pyproject(requirement):
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned, f"{requirement.name} is not in requirements.lock"
    assert requirement.specifier.contains(pinned), f"{requirement} but {pinned} is locked"


def test_the_lock_is_what_is_installed():
    wrong = {}
    for name, pinned in pins().items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = None
        if installed is None or installed.split("+")[0] != pinned:
            wrong[name] = (pinned, installed)
    assert not wrong, f"{{name: (locked, installed)}}: {wrong}"


def test_conda_installs_the_lock():
    """environment.yml names the lock itself, so its pins cannot differ; any it adds must agree."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    conda = {
        part.split("=")[0]: part for part in environment["dependencies"] if isinstance(part, str)
    }
    assert conda.keys() == {"python", "pip", "make"}
    python = conda["python"].split("=")[1]
    assert python == "3.11"
    assert Version(python) in SpecifierSet(PROJECT["requires-python"])
    makefile = (ROOT / "Makefile").read_text()
    assert f"python{python}" in makefile and "-r requirements.lock" in makefile


def test_torch_and_torchvision_are_a_pair():
    """torchvision 0.N belongs to torch 2.(N-15); both come from the same registry, in one call."""
    torch, torchvision = pins()["torch"], pins()["torchvision"]
    assert int(torchvision.split(".")[1]) == int(torch.split(".")[1]) + 15
    ranges = {r.name: r.specifier for r in NEEDED}
    for minor in range(10, 20):  # every pair that the ranges allow is one
        assert (f"2.{minor}.0" in ranges["torch"]) == (f"0.{minor + 15}.0" in ranges["torchvision"])


def test_comparison_libraries_are_not_in_the_environment():
    named = {Requirement(line).name for line in EXTRAS["bench"]}
    assert {"nnsight", "transformer-lens", "pyvene"} <= named
    assert not named & {r.name for r in NEEDED}
    assert not {canonicalize_name(n) for n in named} & pins().keys()


def test_every_import_is_declared():
    """minerlib imports nothing that pyproject leaves to another package to bring; what only a
    notebook uses, and is imported there, comes with the workbook's extra. Triton is torch's own,
    where there is one, and asked for nowhere else."""
    import ast
    from importlib.metadata import packages_distributions

    def named(lines):
        return {canonicalize_name(Requirement(line).name) for line in lines}

    always = named(PROJECT["dependencies"])
    late = always | named(EXTRAS["workbook"])
    providers, missing = packages_distributions(), set()
    for file in (ROOT / "minerlib").rglob("*.py"):
        given = {*sys.stdlib_module_names, "minerlib"} | (
            {"triton"} if file.stem == "kernels" else set()
        )
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            declared = always if node in tree.body else late
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in {n.split(".")[0] for n in names} - given:
                if not declared & {canonicalize_name(d) for d in providers.get(name, [])}:
                    missing.add((file.name, name))
    assert not missing


@pytest.mark.slow
@pytest.mark.fault("what is imported changes the environment that kernels inherit")
def test_importing_the_library_leaves_the_environment_alone():
    """Once notebooks that pytest validated had no figures: a module had set MPLBACKEND."""
    code = """
    import importlib, os, pkgutil
    import matplotlib.pyplot, torch, tqdm, transformers  # which set their own, some of it later
    os.environ.update(KMP_INIT_AT_FORK="FALSE", KMP_DUPLICATE_LIB_OK="True")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", "")
    before = dict(os.environ)
    import minerlib
    for module in pkgutil.walk_packages(minerlib.__path__, "minerlib."):
        importlib.import_module(module.name)
    assert os.environ == before, os.environ.items() ^ before.items()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


def test_nothing_of_this_machine_in_the_set_up():
    files = (
        "pyproject.toml requirements.lock environment.yml Makefile .ci/run .pre-commit-config.yaml"
    )
    for name in files.split():
        text = (ROOT / name).read_text()
        assert not re.search(
            r"index-url|find-links|https?://|file:|/(home|root|work|tmp)/", text
        ), name


def test_the_face():
    package = importlib.import_module("minerlib")
    assert version("minerlib") == PROJECT["version"]
    for name in package.__all__:
        assert hasattr(package, name), name


def test_citation_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_the_whole_project_fits_its_budget():
    """data/ at most 175 MB, without what git ignores: fetched, assembled, parts, figures."""
    files = [f for f in (ROOT / "data").rglob("*") if f.is_file()]
    ignored = {"parts", "assembled", "figures"}
    assert sum(f.stat().st_size for f in files if not ignored & {*f.parts}) <= 175e6


def test_make_knows_its_targets():
    targets = (
        "env models workbook notebooks atlas test test-fast test-ui lint api book bench data clean"
    )
    for target in targets.split():
        done = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_hosted_places_set_up_what_make_does():
    """Continuous integration elsewhere runs .ci/run; Binder and the container take the lock."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert {"run": ".ci/run"} in jobs["locked"]["steps"]
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert container["postCreateCommand"] == "make env models"
    assert container["image"].endswith(":3.11")
    assert (ROOT / ".binder/runtime.txt").read_text() == "python-3.11\n"
    build = lines((ROOT / ".binder/postBuild").read_text())
    assert build[1:] == ["python -m pip install --no-deps -e .", "python -m data.make.grafts"]
    (line,) = lines((ROOT / ".binder/requirements.txt").read_text())
    assert (ROOT / ".binder" / line.removeprefix("-r ")).resolve() == ROOT / "requirements.lock"


def test_make_passes_parameters_on():
    """Also those with spaces and quotes, which a recipe could tear apart."""
    given = ["MODEL=a b", "LIMIT=8", "WEIGHTS={mean: 0.5, max: 0.5}", "PARAMS=ratio=0.05 seed=1"]
    done = subprocess.run(
        ["make", "-n", "workbook", *given], cwd=ROOT, capture_output=True, text=True, check=True
    )
    call = next(line for line in done.stdout.splitlines() if "notebooks/run.py" in line)
    for name in ("MODEL", "LIMIT", "WEIGHTS", "PARAMS"):
        assert f'{name}="${name}"' in call
