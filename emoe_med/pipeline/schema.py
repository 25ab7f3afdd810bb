"""The schema of a pipeline file: which runs, which steps after them, and the table that they make."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from emoe_med.config import Section, TrackingConfig

Dataset = Literal["digits", "cifar10", "cifar100", "tiny_imagenet", "imagenet"]
METRICS = (
    r"test/(mae|top1|top5)"
    r"|fewshot/(digits|cifar10|cifar100|tiny_imagenet|imagenet)/\d+/(token|mean)/(ridge|logistic|nearest_mean)"
    r"|heatmap/(nmi|entropy_given_class|load_cv)"
    r"|routing/[a-z_]+"
)


class RunEntry(Section):
    """One arm: a run file, what is changed in it, and how often it is run."""

    config: str = Field(description="as configs/vision/digits_emoe.yaml; its folder's name is the task")
    set: tuple[str, ...] = Field((), description="key=value, as `--set`; an arm of its own needs name=")
    seeds: tuple[Annotated[int, Field(ge=0, le=999)], ...] = Field((0,), min_length=1)
    folds: Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...] = Field("all", description="brain age only")


class FewShot(Section):
    """Probe the features of every vision run with a few images of each class."""

    verb: Literal["fewshot"]
    dataset: Dataset
    shots: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    draws: int = Field(5, ge=1, description="random supports")


class HeatMap(Section):
    """Count patches by expert and class, for every vision run that routes them."""

    verb: Literal["heatmap"]


class Column(Section):
    """One figure of every row."""

    name: str
    metric: str = Field(pattern=rf"^({METRICS})$")


class Row(Section):
    """One line of the table: an arm that is run, a figure that others printed, or both."""

    name: str
    arm: str | None = Field(None, description="name of a run file; None: nothing is run for this row")
    control: str | None = Field(None, description="arm that this row is compared with, in place of the table's")
    printed: tuple[float | None, ...] = Field((), description="the papers' figures, one for each column")
    note: str = Field("", description="why nothing is run, or how arm and printed row differ")


class Table(Section):
    """The table of a pipeline."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...] = Field((), description="none given: every arm")
    paired_with: tuple[str, ...] = Field((), description="the control; of several the first with the figure")
    source: str = Field("", description="where the printed figures stand")
    differs: tuple[str, ...] = Field((), description="what keeps printed and own figures apart")

    @field_validator("paired_with", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.columns:
            raise ValueError("columns: there is none")
        for row in self.rows:
            if row.printed and len(row.printed) != len(self.columns):
                raise ValueError(f"row {row.name}: {len(row.printed)} printed figures for {len(self.columns)} columns")
            if row.arm is None and not row.printed and not row.note:
                raise ValueError(f"row {row.name}: an arm, a printed figure or a note is needed")
        return self

    def arms(self) -> set[str]:
        """Return the arms that the table asks for."""
        named = [name for row in self.rows for name in (row.arm, row.control) if name is not None]
        return {*named, *self.paired_with}


class DataPlaces(Section):
    """Where data lie below `--data-root`; a data set that is not named lies in a folder of its name."""

    brainage: str | None = Field(None, description="manifest of the scans")
    cifar10: str | None = None
    cifar100: str | None = None
    tiny_imagenet: str | None = None
    imagenet: str | None = None


class Pipeline(Section):
    """One pipeline file."""

    name: str = Field(pattern=r"^[A-Za-z]([0-9]{0,3}[A-Za-z_.-])*[0-9]{0,3}$", max_length=60)
    about: str = Field("", description="what the table is, in a sentence")
    data: DataPlaces = DataPlaces()
    set: tuple[str, ...] = Field((), description="key=value for every run, before its own")
    runs: tuple[RunEntry, ...]
    steps: tuple[Annotated[FewShot | HeatMap, Field(discriminator="verb")], ...] = ()
    table: Table
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _some_runs(self) -> Self:
        if not self.runs:
            raise ValueError("runs: there is none")
        return self
