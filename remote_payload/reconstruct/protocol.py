"""What an adapter is: the user's code that builds the model and the samples for `reconstruct`.

An adapter is a class without constructor arguments, named `module:Class` in the config. It declares and never guesses:
which modalities there are, how each is laid out, and in which range its values lie. Ours is the rest: weights straight
from the file to the device, batches, metrics, baselines, chance levels and pictures.

Subclass `AdapterBase` for the defaults, or write a class with the members of `Adapter`. Arrays may be torch tensors or
numpy arrays wherever one is asked for.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional, Protocol


class AdapterError(Exception):
    """The adapter does not do what it declares, or was asked for what it does not take. The message says which."""


class Kind(str, enum.Enum):
    """What a modality is; decides its metrics and its pictures."""

    IMAGE = "image"
    VIDEO = "video"
    AUDIO_WAVEFORM = "audio_waveform"
    MEL = "mel"
    CODES = "codes"
    TEXT_EMBEDDING = "text_embedding"
    VOXELS = "voxels"


class Role(str, enum.Enum):
    """Whether a modality decides the verdict on the task, or is reported beside it."""

    TARGET = "target"
    AUXILIARY = "auxiliary"


LAYOUTS: Mapping[Kind, tuple[str, ...]] = {
    Kind.IMAGE: ("HWC", "CHW", "HW"),
    Kind.VIDEO: ("HWC", "CHW", "THWC", "TCHW", "CTHW"),
    Kind.AUDIO_WAVEFORM: ("T", "CT", "TC"),
    Kind.MEL: ("MT", "TM"),
    Kind.CODES: ("KT", "TK"),
    Kind.TEXT_EMBEDDING: ("D", "SD"),
    Kind.VOXELS: ("V",),
}
"""Allowed layouts of one sample, a letter an axis: Height, Width, Channel, Time, Mel band, K codebooks, Segment,
Dimension, Voxel. The batch axis comes before and is not written. A video without T is one frame a sample."""


@dataclasses.dataclass(frozen=True)
class VoxelPlaces:
    """Where voxels lie, for maps: `indices` `(V, 3)` into a grid of `shape`; axis 0 left-right, 1 back-front, 2 up."""

    shape: tuple[int, int, int]
    indices: Any


@dataclasses.dataclass(frozen=True)
class Modality:
    """One thing that the model gives back and that has a target to be compared with.

    `shape` is one sample's, in `layout`'s order. `value_range` is (lowest, highest) of target and prediction alike,
    None where there is no bound. `unit` is the values' unit in words. `label` is the caption that must go with the data
    wherever it is shown, such as "simulated BOLD". `sample_rate_hz` is needed for playable sound.
    """

    name: str
    kind: Kind
    layout: str
    shape: tuple[int, ...]
    value_range: Optional[tuple[float, float]]
    unit: str
    role: Role = Role.TARGET
    label: str = ""
    sample_rate_hz: Optional[int] = None
    places: Optional[VoxelPlaces] = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample. `inputs` is what `collate` stacks; `targets` maps modality names to what the model should give back.

    A modality that this sample does not have is left out of `targets`. Samples of one `group` that stand one after
    another are consecutive in time; "" for data without an order. `stimulus` names what was presented and `subject` to
    whom: samples with the same ones are repeats, from which noise ceilings come; "" where it is not known.
    """

    id: str
    inputs: Mapping[str, Any]
    targets: Mapping[str, Any]
    group: str = ""
    stimulus: str = ""
    subject: str = ""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is told.

    `user` is the config's `user_config`, or empty; `user_text` the whole text of a config that is the user's own, with
    its file name. `checkpoint` is the plain dict that the checkpoint carries under `config`: data, not to be trusted.
    """

    user: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    user_name: Optional[str] = None
    user_text: Optional[str] = None
    checkpoint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0


class Adapter(Protocol):
    """The protocol. Every method may raise; the message then stands in the report with the method's name."""

    data_names: tuple[str, ...]
    """Names that must be in the config's `data:`, each a path on the node."""
    split: str
    """The split to evaluate."""
    dependence: int
    """How many neighbouring samples are not independent (windows that overlap, autocorrelation). 1: all independent."""

    def build_model(self, config: AdapterConfig) -> Any:
        """The `nn.Module`, untrained. Called under the meta device, so it costs neither memory nor time."""

    def map_state_dict(self, names: Sequence[str]) -> Mapping[str, Optional[str]]:
        """Checkpoint name to model name, for the names after wrappers' prefixes (`module.`) are gone.

        Names that are left out keep their own; None drops an entry on purpose.
        """

    def modalities(self, data: Mapping[str, str], config: AdapterConfig) -> Sequence[Modality]:
        """What is compared. Sizes may come from the config or the data."""

    def samples(self, split: str, data: Mapping[str, str], config: AdapterConfig) -> Sequence[Sample]:
        """The split's samples: sized and indexable, always in the same order."""

    def collate(self, samples: Sequence[Sample]) -> Any:
        """One batch for `predict`. Tensors in it, nested in dicts, lists and tuples, are moved to the device."""

    def predict(self, model: Any, batch: Any) -> Mapping[str, Any]:
        """Modality name to a tensor `(N, *shape)` in the declared layout and range. Runs without gradients."""

    def train_reference(self, data: Mapping[str, str], config: AdapterConfig) -> Optional[Sequence[Sample]]:
        """Training samples for the baselines, sized and indexable; None: nothing is said about the train mean."""

    def finish_model(self, model: Any) -> None:
        """Fill what no checkpoint holds, such as non-persistent buffers; the weights are in by now."""


class AdapterBase:
    """The defaults: names as they are, inputs stacked, the split `test`, no training reference."""

    data_names: tuple[str, ...] = ()
    split: str = "test"
    dependence: int = 1

    def map_state_dict(self, names: Sequence[str]) -> Mapping[str, Optional[str]]:
        return {name: name for name in names}

    def collate(self, samples: Sequence[Sample]) -> Any:
        return stack_inputs(samples)

    def train_reference(
        self,
        data: Mapping[str, str],  # noqa: ARG002 - the protocol's signature
        config: AdapterConfig,  # noqa: ARG002
    ) -> Optional[Sequence[Sample]]:
        return None

    def finish_model(self, model: Any) -> None:  # noqa: ARG002 - the protocol's signature
        return None

    def latents(
        self,
        model: Any,  # noqa: ARG002 - the protocol's signature
        batch: Any,  # noqa: ARG002
        predicted: Mapping[str, Any],  # noqa: ARG002
    ) -> Optional[Mapping[str, tuple[Any, Any]]]:
        """Optional: by modality, the model's latents of the batch's targets and of `predicted`, each `(N, …)`.

        `batch` is what `predict` was given. Modalities that are left out, or None, have no metric in the latent.
        """
        return None


def stack_inputs(samples: Sequence[Sample]) -> dict[str, Any]:
    """Each input stacked over the samples as one tensor `(N, …)`; `AdapterError` if shapes differ between samples."""
    import torch

    stacked = {}
    for name in samples[0].inputs:
        tensors = [torch.as_tensor(s.inputs[name]) for s in samples]
        shapes = {tuple(t.shape) for t in tensors}
        if len(shapes) > 1:
            raise AdapterError(f"input {name!r} has different shapes in one batch: {sorted(shapes)}; write a collate")
        stacked[name] = torch.stack(tensors)
    return stacked


def call_checked(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call it, after checking that it takes these arguments; `AdapterError` says what it takes and what was given."""
    problem = signature_problem(function, *arguments, **named)
    if problem:
        raise AdapterError(problem)
    return function(*arguments, **named)


def signature_problem(function: Callable[..., Any], *arguments: Any, **named: Any) -> Optional[str]:
    """Why `function` cannot be called so, in a sentence, or None."""
    name = getattr(function, "__qualname__", repr(function))
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*arguments, **named)
    except TypeError as error:
        given = ", ".join([*(type(a).__name__ for a in arguments), *(f"{k}=…" for k in named)])
        return f"{name}{signature} cannot be called with ({given}): {error}"
    return None


def modality_problem(modality: Modality) -> Optional[str]:
    """Why this declaration is none, in a sentence, or None."""
    if modality.layout not in LAYOUTS[modality.kind]:
        return f"layout {modality.layout!r} is none of {', '.join(LAYOUTS[modality.kind])} for {modality.kind.value}"
    if len(modality.shape) != len(modality.layout):
        return f"shape {modality.shape} has not the {len(modality.layout)} axes of layout {modality.layout!r}"
    if min(modality.shape) < 1:
        return f"shape {modality.shape} is empty"
    if modality.value_range is not None and not modality.value_range[0] < modality.value_range[1]:
        return f"range {modality.value_range} is empty"
    if modality.kind is Kind.CODES and modality.value_range is None:
        return "codes need a range (0, number of codes - 1)"
    if modality.places is not None and len(modality.places.indices) != modality.shape[-1]:
        return f"{len(modality.places.indices)} places are given for {modality.shape[-1]} voxels"
    return None
