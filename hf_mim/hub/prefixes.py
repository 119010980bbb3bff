"""Finds the network in a file: the prefix under which most names of one of the key tables are.

People save networks inside other modules (`model.`, `backbone.`, `student.`), inside dictionaries (`state_dict`,
`model_ema`) and inside wrappers. Nothing of this is known here by a list: each prefix before the name of a patch
embedding is tried with each key table.
"""

import re
from collections import Counter
from collections.abc import Iterable

import torch

from hf_mim.files import listed
from hf_mim.hub import key_tables
from hf_mim.hub.key_tables import Row, module_names, within

TABLES = (
    *(key_tables.MAE, key_tables.MAE_CLS_CLASSIFIER, key_tables.MAE_MEAN_CLASSIFIER, key_tables.MAE_LINEAR_PROBE),
    *(key_tables.I_JEPA, key_tables.LATENT_MIM, key_tables.VIT_MAE),
    *(
        [*within(key_tables.VIT_HF, "", f"{name}."), ("", "classifier.weight", None), ("", "classifier.bias", None)]
        for name in ("vit", "ijepa")
    ),
    key_tables.VIT_HF,
    *(within(key_tables.DINOV2_HF, "", prefix) for prefix in ("", "dinov2.")),
    *(within(key_tables.DINOV2_REGISTERS_HF, "", prefix) for prefix in ("", "dinov2_with_registers.")),
)
PATCH_EMBEDDING = re.compile(r"(embed\.proj|projection)\.weight$")
PATCHES = sorted({theirs for table in TABLES for _, theirs, _ in table if PATCH_EMBEDDING.search(theirs)})
NUMBER = re.compile(r"(?<=[.a-z])\d+(?=\.)")  # of a layer; Latent MIM has "linear0." too
# A prefix with one of these words names the average of a network over the training. It wins over an equally whole one.
AVERAGES = ("ema", "teacher", "momentum", "target")


def choose_prefix(state: dict[str, torch.Tensor], name: str, asked: str | None = None) -> tuple[str, list[str]]:
    """(the prefix of the network, the prefixes of other networks that are as whole).

    Args:
        state: tensors by name.
        name: the file, for messages.
        asked: the user's choice: the prefix, or how it begins, with or without the dictionaries around it.

    The prefix under which most keys match a table wins. If several networks are equally whole, an average wins (`ema`,
    `teacher`, `momentum` or `target` in its name).

    Raises:
        ValueError: no key matches, two prefixes are equally good, or there is none as asked.
    """
    keys = list(module_names(state))
    found = {prefix: matches(keys, prefix) for prefix in sorted(candidates(keys), key=len)}
    if not found:
        expected = listed(["patch_embed.proj.weight", "blocks.0.attn.qkv.weight"])
        raise ValueError(
            f"{name} is no checkpoint of MAE, I-JEPA, StoP or Latent MIM: with any prefix, there must be names such as "
            f"{expected}; it has the tensors {listed(grouped(state), 4) or 'of no name'}"
        )
    if asked is not None:
        begun = {prefix: keys for prefix, keys in found.items() if f".{asked}" in f".{prefix}"}
        begun = {asked: found[asked]} if asked in found else begun  # it may end another prefix too
        if not begun:
            raise ValueError(f"prefix must be one of {listed(map(repr, found))} in {name}, not {asked!r}")
        found = begun
    most = max(map(len, found.values()))
    best: dict[str, set[str]] = {}
    for prefix, matched in found.items():  # the shorter first: a longer one inside it is the same network
        if len(matched) == most and not any(matched & other for other in best.values()):
            best[prefix] = matched
    averages = [prefix for prefix in best if any(word in prefix for word in AVERAGES)]
    chosen = list(best) if len(best) == 1 else averages
    if len(chosen) != 1:
        choices = " or ".join(f"--prefix {prefix or repr(prefix)}" for prefix in best)
        raise ValueError(f"{name} has several networks that are equally whole: choose one by {choices}")
    return chosen[0], [prefix for prefix in best if prefix != chosen[0]]


def candidates(keys: Iterable[str]) -> set[str]:
    """What stands before the names of patch embeddings."""
    return {key.removesuffix(name) for key in keys for name in PATCHES if key == name or key.endswith(f".{name}")}


def matches(keys: list[str], prefix: str) -> set[str]:
    """The keys under a prefix that the table which fits best knows."""
    inside = [key for key in keys if key.startswith(prefix)]
    return max((known(inside, prefix, table) for table in TABLES), key=len)


def known(keys: list[str], prefix: str, table: list[Row]) -> set[str]:
    """Those of the keys that a table has, with or without a layer's number."""
    names = {theirs for _, theirs, _ in table}
    ends = {key: key[len(prefix) :] for key in keys}
    return {key for key, end in ends.items() if end in names or NUMBER.sub("{i}", end) in names}


def grouped(keys: Iterable[str], depth: int = 2) -> dict[str, int]:
    """Names with their first parts alone, numbers as `*` → how many keys begin like this."""
    names = (".".join("*" if part.isdigit() else part for part in key.split(".")[:depth]) for key in keys)
    return dict(Counter(names))
