"""`hf-mim card CHECKPOINT`: the model card of a checkpoint, into its README.md."""

from pathlib import Path

from hf_mim.files import check_writable, one_line
from hf_mim.pretraining.settings import split_options

USAGE = """\
usage: hf-mim card CHECKPOINT [--license IDENTIFIER] [--repo_id OWNER/NAME]

Writes CHECKPOINT/README.md, over the one that is there, from the folder's config, recipe.yaml, trainer_state.json,
results/*.json and pictures. What is in none of these is said to be missing.

  --license   such as apache-2.0 or cc-by-nc-4.0; default: the recipe's, or that of the card that is there
  --repo_id   the name on the Hub that the card's examples load; default: the folder's own name"""


def card_command(arguments: list[str]) -> int:
    """`hf-mim card`."""
    from hf_mim.cli import _fail

    if {"-h", "--help"} & set(arguments) or not arguments:
        print(USAGE)
        return 0
    try:
        options, folders = split_options(arguments, lambda name: False)
        if unknown := sorted(options.keys() - {"license", "repo_id"}):
            raise ValueError(f"card has no option {unknown[0]}; there is license and repo_id")
        if len(folders) != 1:
            raise ValueError(f"card needs one CHECKPOINT, not {' and '.join(folders) or 'none'}")
        folder = Path(folders[0])
        if folder.is_dir():
            check_writable(folder, "checkpoint")
        from hf_mim.hub.card import write_card

        path = write_card(folder, options.get("repo_id"), options.get("license"))
    except (ValueError, OSError) as error:
        return _fail(one_line(error))
    print(f"The card is in {path}.")
    return 0
