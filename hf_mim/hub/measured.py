"""What was measured of a checkpoint, as a reader compares it: each number of the trained weights beside that of the
untrained encoder and of raw pixels. Cards and reports show the same rows.

    for row in measurements(RunFacts.read("runs/textures_mae")):
        print(row.label, row.images, row.cells)
"""

from dataclasses import dataclass, field

from hf_mim.evaluation import PROTOCOLS
from hf_mim.evaluation.result import Result, format_number
from hf_mim.hub.card_text import counted, plain, words
from hf_mim.run_folder import AT_START, RunFacts
from hf_mim.scrub import last_name

# Protocol → what readers call it. All of these give shares in 0..1.
TITLES = {
    "knn": "k-NN",
    "leave_one_out": "1-NN, leave one out",
    "linear": "linear classifier",
    "attentive": "attentive classifier",
    "lowshot": "few labels",
    "finetune": "fine-tuning",
    "segment": "segmentation",
    "propagate": "masks through a video",
    "local": "drawn scenes",
}
# The one that a sentence about the checkpoint names: the first that was measured, if possible beside something else.
HEADLINES = ("finetune", "linear", "attentive", "knn", *TITLES)
TRAINED, UNTRAINED, PIXELS = "trained", "untrained", "raw pixels"
COLUMNS = (TRAINED, AT_START, UNTRAINED, PIXELS)
# Score of a result → its column.
BESIDE = {name: name for name in COLUMNS} | {"count from raw pixels": PIXELS}
# Settings that say which weights were measured, or what came out. All others must be equal in one row.
NOT_THE_PROTOCOL = {"untrained", "untrained_seed", "pixels", AT_START, "heads"}


@dataclass
class Measured:
    """A measurement, with the same measurement of what it is compared with.

    results: column → (name of the file, result).
    note: why it is not one of these weights; "" if it is.
    options: the settings in which it differs from other rows of the same protocol and data.
    """

    results: dict[str, tuple[str, Result]]
    note: str = ""
    options: dict = field(default_factory=dict)

    @property
    def result(self) -> Result:
        return next(iter(self.results.values()))[1]

    @property
    def title(self) -> str:
        return TITLES.get(self.result.protocol, self.result.protocol)

    @property
    def label(self) -> str:
        """Protocol and metric; options, if other rows have the same."""
        named = [f"{words(name)} {words(value)}".strip() for name, value in self.options.items()]
        return plain(", ".join([f"{self.title}: {self.result.metric}", *named]))

    @property
    def images(self) -> str:
        """The source of the images, in short."""
        measured = self.result.data.get("test", self.result.data)
        source = words(measured.get("source", "images")).partition(", split ")[0]
        return f"{source} (seen in pretraining)" if measured.get("seen_in_pretraining") is True else source

    @property
    def values(self) -> dict[str, float | None]:
        """Column → number, from the files and from the scores beside the number."""
        own = {column: result.value for column, (_, result) in self.results.items()}
        scores = {BESIDE[name]: x for name, x in self.result.scores.items() if name in BESIDE}
        return {column: x for column, x in scores.items() if isinstance(x, int | float)} | own

    @property
    def cells(self) -> dict[str, str]:
        """Column → the number for readers: shares in percent."""
        return {column: self._text(value) for column, value in self.values.items()}

    def _text(self, value) -> str:
        if value is None:
            return "not finite"
        is_share = self.result.protocol in TITLES and isinstance(value, float | int) and 0 <= value <= 1
        return f"{100 * value:.1f} %" if is_share else words(format_number(value))

    @property
    def numbers(self) -> list[dict]:
        """All numbers as they are: a row for the metric and each score, with a value for each column that has it."""
        names = dict.fromkeys(name for _, result in self.results.values() for name in result.scores)
        values = {column: "not finite" if x is None else x for column, x in self.values.items()}
        columns = [column for column in COLUMNS if column in values]
        scores = {column: result.scores for column, (_, result) in self.results.items()}
        rows = [(self.result.metric, values)]
        rows += [(name, {x: scores.get(x, {}).get(name) for x in columns}) for name in names if name not in BESIDE]
        return [{"": name} | {column: found[column] for column in columns} for name, found in rows]

    @property
    def settings(self) -> dict:
        """The protocol in full, and the images."""
        own = {name: value for name, value in self.result.settings.items() if name not in NOT_THE_PROTOCOL}
        return {"images": data_in_words(self.result.data)} | own

    @property
    def in_full(self) -> str:
        """A line with every value."""
        told = ", ".join(f"{column} {self.cells[column]}" for column in COLUMNS if column in self.cells)
        return f"{self.label} on {self.images}: {told}{f' ({self.note})' if self.note else ''}"

    @property
    def notes(self) -> list[str]:
        """Sentences that a reader of the numbers needs, once each."""
        return [
            plain(f"{column}: {note}" if len(self.results) > 1 else note)
            for column, (_, result) in self.results.items()
            for note in result.notes
        ]

    def is_of(self, other: Result) -> bool:
        """Whether the other result has the same protocol, settings and images."""
        mine = self.result
        shared = (mine.settings.keys() & other.settings.keys()) - NOT_THE_PROTOCOL
        return ((mine.protocol, mine.metric, _images(mine)) == (other.protocol, other.metric, _images(other))) and all(
            mine.settings[name] == other.settings[name] for name in shared
        )


def measurements(facts: RunFacts) -> list[Measured]:
    """The measurements of these weights, by protocol; after them, the results that stand beside none of these."""
    own = [Measured({TRAINED: (name, result)}) for name, result in facts.own_results.items()]
    rest = []
    for name, result in facts.results.items():
        if name not in facts.notes:
            continue
        column = _column(result)
        for row in own if column else ():
            if row.is_of(result) and row.values.get(column, result.value) == result.value:
                row.results[column] = name, result
                break
        else:
            rest.append(Measured({column or TRAINED: (name, result)}, facts.notes[name]))
    order = list(PROTOCOLS)
    for rows in (own, rest):
        rows.sort(key=lambda row: [*order, row.result.protocol].index(row.result.protocol))
        _tell_apart(rows)
    return own + rest


def table(rows: list[Measured]) -> list[dict[str, str]]:
    """The rows in the columns of readers, those without any number left out."""
    columns = [column for column in COLUMNS if any(column in row.values for row in rows)]
    return [
        {"protocol": row.label, "images": row.images} | {column: row.cells.get(column, "") for column in columns}
        for row in rows
    ]


def headline(rows: list[Measured]) -> str:
    """A sentence with the number that tells most; "" if nothing was measured."""
    found = [row for row in rows if not row.note and row.result.value is not None]
    found.sort(key=lambda row: (len(row.values) == 1, [*HEADLINES, row.result.protocol].index(row.result.protocol)))
    if not found:
        return ""
    row, cells = found[0], dict(found[0].cells)
    value = cells.pop(TRAINED)
    beside = ", ".join(f"{column} {cells[column]}" for column in COLUMNS if column in cells)
    said = plain(f"{row.title}, {row.result.metric}")
    return f"Measured on {row.images}: {said} {value}{f' ({beside})' if beside else ''}."


def verdict(rows: list[Measured]) -> str:
    """In words, how often the trained features are better than the others; "" if nothing can be compared."""
    told = []
    for column, name in {UNTRAINED: "those of the untrained encoder", PIXELS: "raw pixels"}.items():
        pairs = [(row.values.get(TRAINED), row.values.get(column)) for row in rows if not row.note]
        pairs = [pair for pair in pairs if None not in pair]
        better = sum(trained > other for trained, other in pairs)
        if pairs:
            told.append(f"better than {name} in {better} of {len(pairs)} measurements")
    return f"The trained features are {' and '.join(told)}." if told else ""


def data_in_words(data: dict) -> str:
    """A result's `data`: where the images come from, how many there are, and the rest."""
    if "test" in data:
        return " → ".join(data_in_words(data[name]) for name in ("train", "test") if name in data)
    known = {name: value for name, value in data.items() if name not in ("source", "images", "local")}
    if not known.get("copies_of_training_images"):
        known.pop("copies_of_training_images", None)
    known |= {"folder": last_name(known["folder"])} if "folder" in known else {}
    parts = [words(data.get("source", "images"))]
    parts += [f"{counted(data['images'])} images"] if "images" in data else []
    return ", ".join(parts + [f"{words(name.replace('_', ' '))}: {words(value)}" for name, value in known.items()])


def _column(result: Result) -> str | None:
    """The column of a result that is there for comparison; None for a result of other weights."""
    flags = {AT_START: AT_START, "untrained": UNTRAINED, "pixels": PIXELS}
    return next((column for flag, column in flags.items() if result.settings.get(flag)), None)


def _images(result: Result) -> dict:
    """The data, without what a pretraining run alone knows of them."""
    told = {name: dict(x) if isinstance(x, dict) else x for name, x in result.data.items()}
    for part in (told, *(x for x in told.values() if isinstance(x, dict))):
        part.pop("seen_in_pretraining", None)
    return told


def _counts(data: dict) -> str:
    """`1000 → 400 images`."""
    parts = [data[name] for name in ("train", "test") if name in data] or [data]
    return f"{' → '.join(counted(part.get('images', '?')) for part in parts)} images"


def _tell_apart(rows: list[Measured]):
    """Give rows of the same protocol and source the settings, or the numbers of images, in which they differ."""
    before = [(row.label, row.images) for row in rows]
    for row, key in zip(rows, before, strict=True):
        twins = [other for other, name in zip(rows, before, strict=True) if name == key]
        own = [{name: words(x) for name, x in other.settings.items() if name != "images"} for other in twins]
        differ = {name: x for name, x in row.settings.items() if any(y.get(name, words(x)) != words(x) for y in own)}
        row.options = dict(list(differ.items())[:2])
        if len(twins) > 1 and not differ:
            row.options = {"": _counts(row.result.data)}
