"""Nothing in the files of a folder leaves its place in the card: block of code, cell of a table, metadata, text."""

import json
import re

import pytest
import yaml
from card_folders import edit, make_folder, section
from huggingface_hub import ModelCard

from hf_mim.hub.card import model_card
from hf_mim.hub.card_text import code, fenced, literal, shown

MARK = "<img src=x onerror=alert(1)>"
HOSTILE = {
    "a fence": f"a\n```\n{MARK}\n```\nb",
    "a long fence": f"a\n``````````\n~~~\n{MARK}\n",
    "a cell": f"a | b |\n|---|\n{MARK}",
    "metadata": f"a\n---\nlicense: stolen\n---\n{MARK}",
    "a span": f"`{MARK}` ``b",
    "a link": f"[x](javascript:alert(1)) ![y](https://evil) {MARK}",
    "a template": "{{ 7 * 7 }} {% raw %} " + MARK,
    "entities": "&lt;img src=x onerror=alert(1)&gt; " + MARK,
    "odd characters": f"a\x00\x85\u2028\ud800\r{MARK}",
    "a string": f'"); import os  # {MARK}',
}


def outside_blocks(text: str) -> str:
    """The lines of a card that are not in blocks of code, by the rules of CommonMark."""
    fence, lines = None, []
    for line in text.splitlines():
        mark = re.match(r" {0,3}(`{3,}|~{3,})\s*([^`]*)$", line)
        if mark and fence is None:
            fence = mark[1]
        elif fence is None:
            lines.append(line)
        elif mark and mark[1][0] == fence[0] and len(mark[1]) >= len(fence) and not mark[2].strip():
            fence = None
    assert fence is None
    return "\n".join(lines)


def plant(folder, text: str):
    """Put the text into every place of the files that a card shows."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= dict.fromkeys(("train_split", "test_split", "dataset", "image_column", "deepspeed"), text)
    recipe |= dict.fromkeys(("crop_scale", "crop_ratio", "blur_sigma", "image_mean", "image_std"), [text, text])
    recipe |= dict.fromkeys(("flip_probability", "grayscale_probability", "blur_probability", text), text)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    data = {"source": text, "images": text, text: text, "folder": text}
    part = {"metric": text, "settings": {text: text, "list": [text, {text: text}]}, "scores": {text: text}}
    part |= {"notes": [text], "device": text, "data": data}
    edit(folder / "results" / "knn.json", **part | {"protocol": text, "data": {"train": data, "test": data}})
    edit(folder / "results" / "training.json", **part)
    edit(folder / "results" / "health.json", **part, table=[{text: text, "measure": text, "worry": "yes"}])
    name = "".join(x for x in text if x.isprintable() and x != "/")
    (folder / "results" / "knn.json").rename(folder / "results" / f"{name}.json")
    state = {"log_history": [{"loss": text}, {"train_runtime": text}], "global_step": text}
    (folder / "trainer_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_in_every_field_stays_in_its_place(tmp_path, kind):
    folder, text = make_folder(tmp_path / "run"), HOSTILE[kind]
    clean = model_card(folder)
    plant(folder, text)
    card = ModelCard(model_card(folder).content.encode().decode())
    assert "onerror" in card.text  # it is told
    prose = outside_blocks(card.text)
    assert re.findall("<[^>]*>", prose) == re.findall("<[^>]*>", outside_blocks(clean.text))
    assert "](javascript" not in prose and "](https://evil" not in prose
    assert "49" not in card.text and not re.search(r"[\x00\x85\u2028\r]", card.content)
    titles = [re.findall(r"^#+ .*", outside_blocks(one.text), re.MULTILINE) for one in (card, clean)]
    assert titles[0] == titles[1]
    for title, columns in {"Results": 4, "Results in full": 3, "Compute": 3}.items():
        assert {line.count("|") for line in section(card, title).splitlines() if "|" in line} == {columns}, title
    metadata = yaml.safe_load(card.content.split("\n---\n")[0].removeprefix("---\n"))
    assert "license" not in metadata and metadata["library_name"] == "hf_mim"


def test_hostile_names_of_a_folder_and_a_repository_stay_in_their_strings(tmp_path):
    folder = make_folder(tmp_path / 'a"); import os #`$(id)`')
    for card in (model_card(folder), model_card(folder, repo_id='me/x"\n```\n<img onerror>')):
        for block in re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL):
            compile(block, "example", "exec")
            assert "import os" not in re.sub(r'"(\\.|[^"\\])*"', '""', block)
        assert "<img onerror" not in outside_blocks(card.text)
    assert """hf-mim export 'a"); import os #`$(id)`' exported""" in model_card(folder).text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("# Title", "&#35; Title"),
        ("- item", "&#45; item"),
        ("1. first", "1&#46; first"),
        ("---", "&#45;--"),
        ("=====", "&#61;===="),
        ("-0.5", "-0.5"),
        (".875", ".875"),
        ("J&F of AdamW (.9, .999); last/mean/norm", "J&F of AdamW (.9, .999); last/mean/norm"),
        ("&lt;", "&#38;lt;"),
        ("two\nlines", "two lines"),
    ],
)
def test_text_has_no_meaning_for_markdown_and_plain_text_stays(text, told):
    assert shown(text) == told


def test_code_is_fenced_by_more_backticks_than_it_has():
    assert fenced("a\n````\nb", "yaml") == "`````yaml\na\n````\nb\n`````"
    assert fenced("a", "") == "```\na\n```"
    assert (code("a.json"), code("a`<b>")) == ("`a.json`", "a&#96;&#60;b&#62;")
    assert literal('a"\n\\') == '"a\\" \\\\"'
