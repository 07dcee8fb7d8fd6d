"""The repository itself: versions agree, dependencies are pinned and installed, files are fit to be published."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "bundle" / "ofl_sam2").rglob("*.py"), *(ROOT / "apps").rglob("*.py")])
MAX_FILE_BYTES = 20_000_000
# Folders that exist on one machine only, as an absolute path: not preceded by a part of a longer path or of an address.
MACHINE_PATH = re.compile(r"(?<![\w.~$})\]/-])(?:/(?:home|root|Users|work|workspace)/\w|[A-Z]:\\Users\\\w)")


def lines_of(name: str) -> list[str]:
    """The requirements in a file: no comments, no options."""
    stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in stripped if line and not line.startswith("-")]


REQUIREMENTS = [
    Requirement(line) for line in dict.fromkeys(lines_of("requirements.txt") + lines_of("requirements-dev.txt"))
]


def package_version() -> str:
    """`__version__` as the build reads it: a literal, found without importing the package."""
    tree = ast.parse((ROOT / "bundle" / "ofl_sam2" / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__version__" for t in node.targets
        ):
            return ast.literal_eval(node.value)
    raise AssertionError("ofl_sam2/__init__.py assigns no literal __version__")


@pytest.fixture(scope="module")
def repository_files() -> list[Path]:
    """Files that are tracked or would be: everything git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listing.split("\0") if name]
    return [file for file in files if file.is_file()]


def test_version_is_the_newest_in_the_changelog() -> None:
    headings = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == package_version()


def test_version_is_the_one_to_cite() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited and cited.group(1) == package_version()


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_requirement_is_pinned(requirement: Requirement) -> None:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    assert "*" not in specifier.version


@pytest.mark.parametrize(
    "requirement", [r for r in REQUIREMENTS if r.marker is None or r.marker.evaluate()], ids=lambda r: r.name
)
def test_installed_version_is_the_pinned_one(requirement: Requirement) -> None:
    assert requirement.specifier.contains(version(requirement.name), prereleases=True), (
        f"{requirement.name} {version(requirement.name)} is installed, {requirement} is pinned; run `make setup`"
    )


def test_build_constraints_agree_with_the_requirements() -> None:
    constraints = lines_of("build-constraints.txt")
    assert any(line.startswith("torch==") for line in constraints)
    assert set(constraints) <= set(lines_of("requirements.txt"))


def test_torch_comes_first() -> None:
    assert lines_of("requirements.txt")[0].startswith("torch==")


def test_imported_distributions_are_requirements() -> None:
    required = {canonicalize_name(r.name) for r in map(Requirement, lines_of("requirements.txt"))}
    distributions = packages_distributions()
    missing = {}
    for source in SOURCES:
        for name in imported_packages(ast.parse(source.read_text())):
            owners = {canonicalize_name(owner) for owner in distributions.get(name, [])}
            if owners and "ofl-sam2" not in owners and not owners & required:
                missing[name] = f"imported by {source.relative_to(ROOT)}; pin one of {sorted(owners)}"
    assert not missing


def imported_packages(tree: ast.Module) -> set[str]:
    """Top-level names of the third-party packages a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names


def test_help_describes_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    described = dict(line.split(maxsplit=2)[1:] for line in shown.splitlines())
    assert described.keys() == set(phony.group(1).split())
    assert all(len(text) > 10 for text in described.values())


def test_no_file_is_too_large(repository_files: list[Path]) -> None:
    large = {str(file.relative_to(ROOT)): file.stat().st_size for file in repository_files}
    assert not {name: size for name, size in large.items() if size > MAX_FILE_BYTES}


def test_no_absolute_machine_paths(repository_files: list[Path]) -> None:
    found = []
    for file in repository_files:
        content = file.read_bytes()
        if b"\0" not in content[:8192]:
            for match in MACHINE_PATH.finditer(content.decode("utf-8", errors="replace")):
                found.append(f"{file.relative_to(ROOT)}: {match.group()}")
    assert not found


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("cd /" + "home/ann/x", True),
        ("'C:" + "\\Users\\ann'", True),
        ("https://a.org/home/x", False),
        ("~/work/x", False),
    ],
)
def test_machine_path_pattern(text: str, hit: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) is hit
