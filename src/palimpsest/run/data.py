"""The `data` of a specification: a generated world, a benchmark by path or hub id, or the user's files."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from palimpsest.worlds.facts import FactsWorld


class Strict(BaseModel):
    """A part of a specification: no keys but its own, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FactsSource(Strict):
    """Invented people and worlds (`worlds/facts.py`)."""

    kind: Literal["facts"]
    people: int = Field(120, ge=4)
    worlds: int = Field(24, ge=0)
    forget_people: int = Field(12, ge=0)
    forget_worlds: int = Field(3, ge=0)
    exposures: int = Field(70, ge=1)

    @model_validator(mode="after")
    def _makes_a_world(self) -> "FactsSource":
        self.world(seed=0)
        return self

    def world(self, seed: int) -> FactsWorld:
        """The generator with these settings."""
        return FactsWorld(**self.model_dump(exclude={"kind"}), seed=seed)


TOFU_AUTHORS = 200
TOFU_SPLITS = {"forget01": 2, "forget05": 10, "forget10": 20}
"""How many authors a published split forgets."""


class TofuSource(Strict):
    """TOFU's invented authors, twenty questions each; the last ones are forgotten.

    A `split` is the benchmark as published, on all authors and with its own metrics; otherwise some authors are taken.
    """

    kind: Literal["tofu"]
    path: str
    """A folder with TOFU's JSON files, or its hub id."""
    split: Literal["forget01", "forget05", "forget10"] | None = None
    authors: int = Field(40, ge=4, le=TOFU_AUTHORS)
    forget_authors: int = Field(4, ge=1, le=20)

    @model_validator(mode="before")
    @classmethod
    def _split_says_how_many(cls, settings: Any) -> Any:
        split = settings.get("split") if isinstance(settings, dict) else None
        if split not in TOFU_SPLITS:
            return settings
        counts = {"authors": TOFU_AUTHORS, "forget_authors": TOFU_SPLITS[split]}
        for name, count in counts.items():
            if settings.get(name, count) != count:
                raise ValueError(f"split {split} has {name} {count}, not {settings[name]}; leave {name} out")
        return settings | counts


class WmdpSource(Strict):
    """WMDP: a corpus to forget, one to keep, and multiple-choice questions about the first (arXiv 2403.03218).

    Every corpus and every set of questions is a file or a hub id.
    """

    kind: Literal["wmdp"]
    forget: str
    """Rows with a `text`, or a `title` and an `abstract`."""
    retain: str
    questions: str
    """Rows with `question`, `choices` and `answer`, the right choice's place."""
    subject: str
    """What the questions are about, for the line above each: biology, chemistry or cybersecurity in WMDP."""
    utility: str | None = None
    """Multiple-choice questions about what is to be kept, MMLU's say; their rows name their `subject`."""
    passage_words: int = Field(200, ge=2)
    """Longer texts are cut into passages of at most so many words."""
    max_passages: int | None = Field(1000, ge=3)
    """Passages of either corpus, the first ones of every text before the second."""
    max_questions: int | None = Field(None, ge=1)
    """Questions of either set, drawn by the run's seed."""


class FileSource(Strict):
    """The user's own rows."""

    kind: Literal["files"]
    forget: str
    retain: str
    format: str | None = None
