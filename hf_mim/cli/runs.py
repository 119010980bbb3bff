"""`hf-mim runs FOLDER`: lists the runs in a folder."""

from hf_mim.cli.errors import told_in_one_line
from hf_mim.cli.options import Command

TEXT = """\
List the runs of hf-mim pretrain in FOLDER and below it: method, size, data, step, whether a process trains now
(running), all steps are made (ended) or some are missing (stopped), the last loss, and the best k-NN accuracy of the
probe."""


def run(folder: str):
    with told_in_one_line("nothing was written"):
        from hf_mim.evaluation.result import format_table
        from hf_mim.runs import find_runs

        lines = [found.line for found in find_runs(folder)]
    print(format_table(lines, indent=""))


SUMMARY = "list the runs in a folder: what they train, how far they are"
command = Command("runs", run, ("FOLDER",), list, TEXT, short_help=SUMMARY, no_args_is_help=True)
