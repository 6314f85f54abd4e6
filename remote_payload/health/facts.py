"""What the checks get: everything that was read, and nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Optional

from remote_payload.checkpoint.header import CheckpointHeader, Role, Section, TensorEntry
from remote_payload.health.run_config import as_number
from remote_payload.health.stats import JointStats, Misalignment, TensorStats


@dataclasses.dataclass(frozen=True)
class ChecksumMismatch:
    """A record whose bytes are not those that were written."""

    record: str
    stated: int
    computed: int
    size: int


@dataclasses.dataclass(frozen=True)
class ChecksumFacts:
    """Of `records`, `checked` were compared with their checksum and `without` carry none."""

    records: int
    checked: int
    without: int
    mismatches: tuple[ChecksumMismatch, ...] = ()


@dataclasses.dataclass(frozen=True)
class NativeUse:
    """Whether the pass ran by kernels compiled for this CPU, and why not: torch's own give the same numbers."""

    used: bool
    why_not: str = ""


@dataclasses.dataclass(frozen=True)
class ScanResult:
    """The pass over a file: statistics by tensor name, or why there are none.

    `joint`: by the model's parameter name, for every parameter that Adam's moments were read with; `joint_not_measured`
    says why others with moments have none. `misaligned` is from the header alone.
    """

    stats: dict[str, TensorStats]
    not_measured: dict[str, str]
    checksums: ChecksumFacts
    read_errors: dict[str, str]
    bytes_read: int
    joint: dict[str, JointStats] = dataclasses.field(default_factory=dict)
    joint_not_measured: dict[str, str] = dataclasses.field(default_factory=dict)
    misaligned: tuple[Misalignment, ...] = ()
    native: Optional[NativeUse] = None


@dataclasses.dataclass(frozen=True)
class TensorDrift:
    """A tensor against its earlier self: the part of elements that are equal, ‖Δ‖ / ‖earlier‖, and the cosine.

    The last two are None where a norm is 0 or not finite.
    """

    count: int
    identical_fraction: float
    relative_change: Optional[float]
    cosine: Optional[float]


@dataclasses.dataclass(frozen=True)
class DriftFacts:
    """The model's tensors against those of an earlier checkpoint, and how far either says that it was trained."""

    earlier: str
    tensors: dict[str, TensorDrift]
    not_compared: dict[str, str]
    steps: Optional[int] = None
    earlier_steps: Optional[int] = None


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """The tail of the squared singular values, those of at least `x_min`: `alpha` and its standard error.

    `distance` is Kolmogorov and Smirnov's between the `tail` values and the fitted law.
    """

    alpha: float
    alpha_error: float
    x_min: float
    tail: int
    distance: float


@dataclasses.dataclass(frozen=True)
class SpectralFacts:
    """A weight as a matrix. `stable_rank` is the squared ratio of Frobenius and spectral norm, None for a matrix of 0.

    `iterations` is 0 where every singular value was computed: quantiles (0, ¼, ½, ¾, 1) and `power_law` exist then
    only.
    """

    rows: int
    columns: int
    frobenius_norm: float
    spectral_norm: float = 0.0
    stable_rank: Optional[float] = None
    iterations: int = 0
    converged: bool = False
    singular_value_quantiles: Optional[tuple[float, ...]] = None
    power_law: Optional[PowerLaw] = None


@dataclasses.dataclass(frozen=True)
class SpectraFacts:
    """What the opt-in passes found, by tensor name, and why others have nothing."""

    tensors: dict[str, SpectralFacts]
    not_measured: dict[str, str]


@dataclasses.dataclass(frozen=True)
class HealthFacts:
    """A header and the pass over its file. `changed` says how the file changed while it was read.

    `drift` is there if an earlier checkpoint was given to compare with, `spectra` if a pass for them was asked for.
    """

    header: CheckpointHeader
    scan: ScanResult
    changed: Optional[str] = None
    drift: Optional[DriftFacts] = None
    spectra: Optional[SpectraFacts] = None

    def measured(self, *roles: Role, section: Optional[Section] = None) -> Iterator[tuple[TensorEntry, TensorStats]]:
        """Tensors that have statistics, of the given roles (all if none) and section (all if None)."""
        for tensor in self.header.tensors:
            stats = self.scan.stats.get(tensor.name)
            if stats is None or (roles and tensor.role not in roles) or (section and tensor.section is not section):
                continue
            yield tensor, stats

    @property
    def unmeasured(self) -> list[str]:
        """Tensors that hold values and could not be measured: nothing may pass on their silence."""
        return [t.name for t in self.header.tensors if t.numel and t.name in self.scan.not_measured]

    def joint(self, name: str) -> Optional[JointStats]:
        """What the model's parameter of that name and its moments come to together, None if nothing was read."""
        return self.scan.joint.get(name)

    @functools.cached_property
    def matched_parameters(self) -> frozenset[str]:
        """The parameters that an optimizer is known to hold."""
        return frozenset(name for o in self.header.optimizers for name in o.parameters.values())

    @functools.cached_property
    def optimizer_names(self) -> Optional[frozenset[str]]:
        """The parameters that the optimizers hold, None if an entry of one cannot be matched to a name."""
        optimizers = self.header.optimizers
        if not optimizers or not all(o.is_matched for o in optimizers):
            return None
        return self.matched_parameters

    def steps_trained(self) -> int:
        """The most optimizer steps that the file itself gives evidence of: its labels, counters or optimizer."""
        found = [0]
        for key in ("global_step", "step", "steps", "iteration", "epoch"):
            value = as_number(self.header.scalars.get(key))
            if value is not None:
                found.append(int(value))
        found.extend(int(t.value) for t in self.header.tensors if t.role is Role.COUNTER and isinstance(t.value, int))
        for optimizer in self.header.optimizers:
            found.extend(int(s) for s in map(as_number, optimizer.steps) if s is not None)
        return max(found)
