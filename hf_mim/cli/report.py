"""`hf-mim report RUN…`: runs as a page to read."""

from hf_mim.cli.errors import Mistake, told_in_one_line
from hf_mim.cli.options import Command, Setting

TEXT = """\
Write one HTML page about a run of hf-mim pretrain, also of one that still trains or has stopped: what was trained on
what, results, pictures, curves, health in words, recipe. The page of several runs shows them side by side. Everything
is in the file: it can be sent, printed, and read without a network.

\b
hf-mim report runs/mae
hf-mim report runs/mae runs/stop --output both.html"""


def settings() -> list[Setting]:
    output = "the file, a new one or an older report; default: report.html, in RUN or, for several runs, here"
    return [Setting("output", str, text=output)]


class Report(Command):
    """It takes any number of runs."""

    def check_words(self, path: str, words: list[str]):
        if not words:
            raise Mistake("report needs run folders: hf-mim report RUN")


def run(*folders: str, output: str | None = None):
    with told_in_one_line("nothing was written"):
        from hf_mim.report.write import write_report

        path = write_report(folders, output)
    print(f"The report is in {path}. Open it in a browser.")


SUMMARY = "a page about a run, or several side by side, to read in a browser"
command = Report("report", run, ("RUN ...",), settings, TEXT, short_help=SUMMARY, no_args_is_help=True)
