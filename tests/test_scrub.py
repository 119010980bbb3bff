"""What may leave this machine."""

import pytest

from hf_mim.scrub import public_source, scrubbed, scrubbed_all


def test_tokens_are_hidden_whatever_they_look_like(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct horse")
    assert scrubbed("at hf_abcdefGHIJ0123 and correct horse") == "at *** and ***"
    assert scrubbed("hf_mim of hf_short; hf-mim") == "hf_mim of hf_short; hf-mim"


def test_texts_at_any_depth_and_names_are_scrubbed_and_the_rest_stays():
    value = {"/home/me/a": [("/home/me/b", 1.5, None)], 3: {"x": True}}
    assert scrubbed_all(value) == {"a": [("b", 1.5, None)], 3: {"x": True}}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/data/x/photos", "photos"),
        ("../photos/", "photos"),
        ("~/photos", "photos"),
        ("home/alice/photos", "photos"),
        ("sets/photos", "sets/photos"),
        ("owner/name:config", "owner/name:config"),
    ],
)
def test_a_recipe_names_a_source_without_the_folders_of_a_machine_or_its_user(given, told, monkeypatch):
    monkeypatch.setenv("USER", "alice")
    monkeypatch.setenv("HOME", "/home/alice")
    assert public_source(given) == told
