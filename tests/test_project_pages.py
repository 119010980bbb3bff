"""The pages for people who join say what is true, and the CI file runs what `.ci/run` runs."""

import re
import runpy
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import hf_mim
from hf_mim.evaluation import PROTOCOLS
from hf_mim.methods import rows

REPOSITORY = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "README.md")


def text(name):
    return (REPOSITORY / name).read_text()


def test_the_ci_file_runs_what_has_to_pass_before_a_change_goes_in():
    jobs = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands["test"] == [".ci/run"] and commands["oldest-dependencies"] == ["make test-oldest"]
    assert commands["docs"] == ["make docs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert [line for line in text(".ci/run").splitlines() if line.startswith("make")] == [
        "make lint",
        "make types",
        "make test",
    ]


def test_pre_commit_has_the_ruff_of_the_constraints():
    (hook,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert f"ruff=={hook['rev'].removeprefix('v')}\n" in text("constraints.txt")


def test_there_is_one_version():
    version = re.search("^version = (.*)$", text("setup.cfg"), re.M)[1]
    assert yaml.safe_load(text("CITATION.cff"))["version"] == version
    assert f"## {version}" in text("CHANGELOG.md") and hf_mim.__version__ == version


def test_there_is_one_oldest_python_and_transformers_takes_it():
    oldest = re.search("^python_requires = >=(.*)$", text("setup.cfg"), re.M)[1]
    assert f"You need Python ≥ {oldest} " in text("README.md")
    assert f"You need Python {oldest} or newer" in text("CONTRIBUTING.md")
    assert f'# requires-python = ">={oldest}"' in text("training/job.py")
    assert f'target-version = "py{oldest.replace(".", "")}"' in text("pyproject.toml")
    jobs = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"][0] == oldest
    assert f"{oldest}.0" in SpecifierSet(metadata("transformers")["Requires-Python"])


@pytest.mark.parametrize("page", PAGES)
def test_files_and_targets_that_a_page_names_are_there(page):
    targets = re.findall(r"^([\w-]+):", text("Makefile"), re.M)
    for target in re.findall(r"`make ([\w -]+)`", text(page)):
        assert set(target.split()) <= set(targets), target
    for name in re.findall(r"`((?:tests|hf_mim|docs|training|model_cards)/[\w./-]+)`", text(page)):
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text(page)):
        assert (REPOSITORY / name).exists(), name


def test_each_page_of_the_docs_is_in_the_navigation_of_the_site():
    listed = re.findall(r": ([\w/]+\.md)$", text("mkdocs.yml").split("nav:")[1], re.M)
    docs = REPOSITORY / "docs"
    written = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")]
    beside = ["index.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
    assert sorted(listed) == sorted(written + beside)


def test_the_reference_has_each_public_name_and_each_protocol():
    told = "".join(path.read_text() for path in (REPOSITORY / "docs" / "reference").glob("*.md"))
    for name, module in hf_mim._MODULES.items():
        assert f"::: {getattr(hf_mim, name).__module__}.{name}\n" in told, f"{module}: {name}"
    assert all(f"::: hf_mim.evaluation.{place.replace(':', '.')}\n" in told for place in PROTOCOLS.values())


def test_the_pages_in_the_root_link_into_the_site():
    links = runpy.run_path(str(REPOSITORY / ".ci" / "docs.py"))
    moved = links["LINK"].sub(
        lambda link: links["in_site"](link[0]), "[a](docs/data.md#values) [b](README.md) [c](https://x.org/docs/a)"
    )
    assert moved == "[a](data.md#values) [b](index.md) [c](https://x.org/docs/a)"


def test_the_changelog_names_each_method():
    assert all(method.title in text("CHANGELOG.md") for method in rows(variants=True))
