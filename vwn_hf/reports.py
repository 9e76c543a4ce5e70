"""What upcycling would do, and what it did: for a terminal, and as JSON."""

import json
from dataclasses import asdict, dataclass, field

from .checkpoints import shown
from .verification import Verification


def dropped_lines(dropped: dict[str, str]) -> list[str]:
    """A line for each reason."""
    groups: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        groups.setdefault(reason, []).append(name)
    return [f"Left out: {shown(names)}: {reason}." for reason, names in sorted(groups.items())]


@dataclass
class UpcyclingEstimate:
    """What `upcycle` would do. Sizes in bytes, of weights; FLOPs of one token's forward pass.

    Attributes:
        files: size of each weight file.
        unchanged: those that are a file of the source as it is.
        memory: about what the process will hold at most; checking the logits takes 2.5 decoder layers.
        bytes_to_write: without what is linked, and what an unfinished run wrote already.
        bytes_to_read: for copies, hashes and verification.
        bytes_per_second: of copying and hashing, measured on the output's disk.
    """

    source: str
    output: str
    files: dict[str, int]
    unchanged: list[str]
    dropped: dict[str, str]
    source_parameters: int
    added_parameters: int
    flops_per_token: float
    added_flops_per_token: float
    verification: str
    memory: int
    bytes_to_write: int
    bytes_to_read: int
    free_bytes: int
    bytes_per_second: float

    @property
    def seconds(self) -> float:
        return max(self.bytes_to_write, self.bytes_to_read) / self.bytes_per_second

    def as_json(self) -> str:
        return json.dumps(asdict(self) | {"seconds": self.seconds}, indent=2)

    def summary(self) -> str:
        size, changed = sum(self.files.values()), [name for name in self.files if name not in self.unchanged]
        rows = [f"  {name:<40} {self.files[name]:>18,} bytes, {self.how(name)}" for name in changed]
        if self.unchanged:
            unchanged = sum(self.files[name] for name in self.unchanged)
            rows.append(f"  {f'{len(self.unchanged)} more':<40} {unchanged:>18,} bytes, as in the source")
        return "\n".join(
            [
                f"{self.source} → {self.output}: nothing is written yet.",
                *rows,
                f"  {'all':<40} {size:>18,} bytes, {self.bytes_to_write:,} to be written; {self.free_bytes:,} are free",
                *dropped_lines(self.dropped),
                f"Parameters: {self.source_parameters:,} + {self.added_parameters:,} "
                f"({self.added_parameters / self.source_parameters:.2%})",
                f"FLOPs per token: {self.flops_per_token:,.0f} + {self.added_flops_per_token:,.0f} "
                f"({self.added_flops_per_token / self.flops_per_token:.2%})",
                f"Memory: about {self.memory / 1e6:,.0f} MB, verification by {self.verification}",
                f"Time: about {self.seconds:,.0f} s at {self.bytes_per_second / 1e6:,.0f} MB/s, measured here",
            ]
        )

    def how(self, name: str) -> str:
        return "what is added" if name == list(self.files)[-1] else "copied without what is replaced or left out"


@dataclass
class UpcyclingReport:
    """What `upcycle` did. The output's own report has it without what differs between machines: output and linked.

    `source_card` is what a model made from another takes over of its card: licence, language, data sets.
    `max_difference` is the largest |VWN logit − source logit|; None if logits were not compared.
    """

    source: str
    output: str
    commit: str | None
    vwn_hf: str
    model_type: str
    segments: int
    slots: int
    carry: str
    embedding: str
    embedding_rank: int | None
    group_norm: bool
    slot_start: str
    untied: bool
    mtp_layers: int
    dropped: dict[str, str]
    source_parameters: int
    added_parameters: int
    options: dict
    source_sha256: dict[str, str]
    source_card: dict[str, str | list[str]]
    other_files: list[str]
    verification: Verification
    linked: list[str] = field(default_factory=list)

    @property
    def logits_equal(self) -> bool | None:
        return self.verification.logits_equal

    @property
    def max_difference(self) -> float | None:
        return self.verification.max_difference

    def as_json(self, without: tuple[str, ...] = ()) -> str:
        return json.dumps({key: value for key, value in asdict(self).items() if key not in without}, indent=2)

    def summary(self) -> str:
        added = self.added_parameters / self.source_parameters
        lines = [
            f"{self.source} ({self.model_type.removeprefix('vwn_')}) → {self.output}",
            f"m={self.segments}, n={self.slots}, "
            f"state {self.slots / self.segments:g} times as wide, {self.embedding} embedding"
            + (f" of rank {self.embedding_rank}" if self.embedding_rank else "")
            + (", untied" if self.untied else "")
            + (f", {self.carry} carry" if self.carry != "free" else ""),
            f"{self.source_parameters:,} parameters + {self.added_parameters:,} ({added:.1%})",
        ]
        if self.mtp_layers:
            lines.append(f"multi-token prediction: {self.mtp_layers} added, from the last layer")
        lines += dropped_lines(self.dropped)
        if self.other_files:
            lines.append(f"Not read, as they are no part of the checkpoint: {shown(self.other_files)}.")
        if self.linked:
            lines.append(f"{len(self.linked)} weight files share their bytes with the source's.")
        return "\n".join([*lines, self.verification.summary()])
