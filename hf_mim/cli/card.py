"""`hf-mim card CHECKPOINT`: writes the model card of a checkpoint to its README.md."""

from hf_mim.cli.errors import told_in_one_line
from hf_mim.cli.options import Command, Setting
from hf_mim.files import check_writable

TEXT = """\
Write CHECKPOINT/README.md from the folder's config, recipe.yaml, trainer_state.json, results/*.json and pictures. A
README.md that is there is replaced. The card says which facts are in none of these files."""


def settings() -> list[Setting]:
    license = "such as apache-2.0 or cc-by-nc-4.0; default: that of the recipe, or of the card that is there"
    repo_id = "the name on the Hub that the card's examples load; default: the name of the folder"
    return [Setting("license", str, text=license), Setting("repo_id", str, text=repo_id)]


def run(checkpoint: str, license: str | None = None, repo_id: str | None = None):
    with told_in_one_line("nothing was written"):
        check_writable(checkpoint, "checkpoint")
        from hf_mim.hub.card import write_card

        path = write_card(checkpoint, repo_id, license)
    print(f"The card is in {path}.")


SUMMARY = "write the model card of a checkpoint, from what was measured"
command = Command("card", run, ("CHECKPOINT",), settings, TEXT, short_help=SUMMARY, no_args_is_help=True)
