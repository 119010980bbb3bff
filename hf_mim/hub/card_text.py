"""How a model card shows values from files: without paths of the machine, and so that none leaves its place.

This is the one place that escapes. A value in running text or in a cell goes through `shown` (or `shown_number`), a
value in the metadata or in an example through `plain` and `literal`, a name in a code span through `code`, a block of
code through `fenced`.
"""

import json
import re

from huggingface_hub import EvalResult

from hf_mim.evaluation.result import Result, format_number
from hf_mim.scrub import scrubbed

# What has a meaning in Markdown or HTML. As a numeric entity it has none, in cells of tables too.
SPECIAL = re.compile(r"&(?=#?\w+;)|[<>`*\[\]|\\~$]")
# What has a meaning only at the beginning of a line: headings, lists, lines.
BEGINNING = re.compile(r"^(\d{1,9})?([-+#=_.)])(?=[-+#=_\s]|$)")

# Protocol → the Hub's name of its task. All other protocols are image-feature-extraction.
TASKS = dict.fromkeys(("knn", "leave_one_out", "linear", "attentive", "lowshot", "finetune"), "image-classification")
TASKS |= dict.fromkeys(("segment", "propagate"), "image-segmentation")


def shown(value) -> str:
    """A value as text that can stand anywhere in the card: `words`, with its Markdown and HTML escaped."""
    text = SPECIAL.sub(lambda match: f"&#{ord(match[0])};", words(value))
    return BEGINNING.sub(lambda match: f"{match[1] or ''}&#{ord(match[2])};", text)


def words(value) -> str:
    """A value in words on one line, scrubbed. Nothing is escaped."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value))
    if isinstance(value, dict):
        return ", ".join(f"{words(name)} {words(x)}" for name, x in value.items())
    return plain(f"{value:.6g}" if isinstance(value, float) else "none" if value is None else value)


def counted(value) -> str:
    """A number of things as `50,000`; anything else in words."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else words(value)


def shown_number(value) -> str:
    """`shown`, after `format_number`."""
    return shown(format_number(value))


def plain(value) -> str:
    """A text on one line, scrubbed, without characters that cannot be printed. Its Markdown is not escaped."""
    text = " ".join(scrubbed(value).split())
    return "".join(x if x.isprintable() else "\N{REPLACEMENT CHARACTER}" for x in text)


def literal(value) -> str:
    """A text as a string of Python, in double quotes."""
    return json.dumps(plain(value), ensure_ascii=False)


def code(value) -> str:
    """A name as a span of code, or as text if it has more than letters, digits and a few signs."""
    return f"`{value}`" if re.fullmatch(r"[\w.,+=%@()-]+", str(value)) else shown(value)


def fenced(text: str, language: str) -> str:
    """A block of code, with a fence that is longer than any run of backticks in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def is_hub_name(source: str) -> bool:
    """Whether it has the form `owner/name` or `owner/name:config`. A path may have this form too."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", str(source)))


def eval_result(result: Result) -> EvalResult:
    """A result as the metadata of a card have it."""
    measured = result.data.get("test", result.data)
    source, _, split = plain(measured.get("source", "images")).partition(", split ")
    return EvalResult(
        task_type=TASKS.get(result.protocol, "image-feature-extraction"),
        dataset_type=source if is_hub_name(source) else re.sub(r"[^\w.-]+", "-", source),
        dataset_name=source,
        dataset_split=split or None,
        metric_type=re.sub(r"\W+", "_", result.metric.lower()),
        metric_name=plain(f"{result.metric} ({result.protocol})"),
        metric_value=result.value,
    )


def markdown_table(rows: list[dict[str, str]]) -> str:
    """A table of cells that went through `shown`; "" for no rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if columns else ""
