"""The pages for people who join say what is true, and the CI file runs what `.ci/run` runs."""

import re
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import hf_mim
from hf_mim.methods import rows

REPOSITORY = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "README.md")


def text(name):
    return (REPOSITORY / name).read_text()


def test_the_ci_file_runs_what_has_to_pass_before_a_change_goes_in():
    jobs = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands["test"] == [".ci/run"] and commands["oldest-dependencies"] == ["make test-oldest"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert [line for line in text(".ci/run").splitlines() if line.startswith("make")] == ["make lint", "make test"]


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


def test_the_changelog_names_each_method():
    assert all(method.title in text("CHANGELOG.md") for method in rows(variants=True))
