"""`hf-mim embed CHECKPOINT --dataset SOURCE --output FILE`: writes the features of images to a file."""

from hf_mim.cli.errors import told_in_one_line
from hf_mim.cli.options import Command, Setting, settings_of

TEXT = """\
Write the features of every image of SOURCE to FILE, with names and labels: a Parquet file (.parquet), an array (.npy,
with names and labels in a .csv beside it), or a folder of datasets. CHECKPOINT is a folder, or a name on the Hub, of
any vision encoder that transformers' AutoModel loads. The same command goes on where it was stopped.

\b
hf-mim embed runs/mine --dataset my_photos --output photos.parquet
hf-mim embed runs/mine --dataset my_photos --features last/cls/norm,last4/mean/norm --output photos.parquet
hf-mim embed runs/mine --dataset my_photos --features last/tokens/norm --output patches.npy
hf-mim embed runs/mine --dataset owner/name --streaming true --output photos.parquet"""


def settings() -> list[Setting]:
    from hf_mim.embeddings.embed import OF_THE_ENCODER, EmbedArguments
    from hf_mim.evaluation.measure import EncoderArguments

    return settings_of(EmbedArguments, "images and file") + settings_of(EncoderArguments, "encoder", OF_THE_ENCODER)


def run(checkpoint: str, **given: str):
    with told_in_one_line("what was extracted is kept, and the same command goes on from there"):
        from transformers.utils.logging import disable_progress_bar

        from hf_mim.front_door import embed

        disable_progress_bar()
        done = embed(checkpoint, **given)
    broken = f" ({done.broken:,} more cannot be decoded)" if done.broken else ""
    print(
        f"{done.output} holds {', '.join(done.features)} of {done.images:,} images{broken}; {done.seconds:.1f} s.\n\n"
        f"Find images in it:\n\n    hf-mim search {checkpoint} IMAGE --in {done.output}"
    )


SUMMARY = "write the features of images to a Parquet file, an array or a datasets folder"
command = Command("embed", run, ("CHECKPOINT",), settings, TEXT, short_help=SUMMARY, no_args_is_help=True)
