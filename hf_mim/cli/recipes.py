"""`hf-mim recipes`: the recipes that come with hf_mim, with the numbers that were measured."""

import textwrap

from hf_mim.cli.errors import told_in_one_line
from hf_mim.cli.options import Command

TEXT = """\
List the recipes that come with hf_mim: what each trains, and the numbers that were measured with it, if it was run.
hf-mim pretrain NAME runs one; --argument value changes a setting of it."""


def run():
    with told_in_one_line("nothing was written"):
        from hf_mim.pretraining.recipe_files import recipe_files

        found = recipe_files()
    for recipe in found:
        print(recipe.name)
        for text in (recipe.about, recipe.measured or "No run of it was measured."):
            print(textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="  "))


SUMMARY = "list the recipes that come with hf_mim, with their numbers"
command = Command("recipes", run, (), list, TEXT, short_help=SUMMARY)
