"""`hf-mim search CHECKPOINT QUERY_IMAGE… --in EMBEDDINGS_OR_SOURCE`: the nearest images; `--duplicates`."""

import click

from hf_mim.cli.errors import Mistake, told_in_one_line
from hf_mim.cli.options import Command, Setting, settings_of
from hf_mim.pretraining.settings import to_type

TEXT = """\
Find the images of a collection that are nearest to QUERY_IMAGE, by the features of CHECKPOINT: as a table, as a contact
sheet (search.png) and as search.csv. The collection is a file of hf-mim embed, or images as for hf-mim pretrain.

\b
hf-mim search runs/mine photo.jpg --in photos.parquet
hf-mim search runs/mine photo.jpg other.jpg --in my_photos --k 20
hf-mim search runs/mine --in photos.parquet --duplicates       # near-duplicates within the collection
hf-mim search runs/mine --in photos.parquet --map --output map.png"""
LONGEST = 60  # rows that are printed


def settings() -> list[Setting]:
    from hf_mim.embeddings.embed import OF_THE_ENCODER
    from hf_mim.embeddings.search import SearchArguments
    from hf_mim.evaluation.measure import EncoderArguments

    where = "where to search: a file or folder of hf-mim embed, or a source of images, as for hf-mim pretrain"
    found = [Setting("in", str, text=where, section="search"), *settings_of(SearchArguments, "search")]
    return found + settings_of(EncoderArguments, "encoder", OF_THE_ENCODER)


class SearchCommand(Command):
    """It takes any number of images."""

    def check_words(self, path: str, words: list[str]):
        if not words:
            raise Mistake("search needs CHECKPOINT and images: hf-mim search CHECKPOINT IMAGE --in EMBEDDINGS")

    def invoke(self, ctx: click.Context):
        where = ctx.params.pop("in", None)
        return self.callback(*ctx.args, where=where, **ctx.params)


def run(checkpoint: str, *queries: str, where: str | None = None, **given: str):
    with told_in_one_line("the features so far are kept, and the same command goes on from them"):
        from transformers.utils.logging import disable_progress_bar

        from hf_mim.embeddings import report
        from hf_mim.embeddings.embed import option_types
        from hf_mim.embeddings.search import Search, SearchArguments
        from hf_mim.evaluation.result import format_table

        disable_progress_bar()
        types = option_types(SearchArguments)
        values = {name: to_type(name, value, types[name]) for name, value in given.items()}
        if where is None:
            raise ValueError("in must be given: a file or folder of hf-mim embed, or a source of images")
        of_all = next((name for name in ("duplicates", "map") if values.get(name)), None)
        if of_all and queries:
            raise ValueError(f"{of_all} needs the collection alone; leave out the query {queries[0]}")
        if not of_all and not queries:
            raise ValueError("search needs an image to search for, --duplicates or --map")
        search = Search(checkpoint, where, **values)
        report.check_picture(search.source.output)
        if search.source.map:
            print(f"The map is in {report.write_map(search)}.")
            return
        if queries:
            found = search.nearest(queries)
            rows = report.nearest_rows(queries, found)
        else:
            found = search.duplicates()
            rows = report.duplicate_rows(found)
            if not rows:
                print(f"No two of the {len(search.collection):,} images have a cosine of {search.source.threshold:g}.")
                return
            print(f"{len(rows):,} of {len(search.collection):,} images, in {len(found):,} groups:\n")
    print(format_table(rows[:LONGEST]))
    print(f"  … {len(rows) - LONGEST:,} more rows" if len(rows) > LONGEST else "")
    with told_in_one_line("the picture was not written"):
        output = report.write(search, found, rows, queries)
    print(f"All rows are in {output.with_suffix('.csv')}, the pictures in {output}.")


SUMMARY = "find the images nearest to an image, or the near-duplicates of a collection"
command = SearchCommand(
    "search", run, ("CHECKPOINT", "QUERY_IMAGE ..."), settings, TEXT, short_help=SUMMARY, no_args_is_help=True
)
