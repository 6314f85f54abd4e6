"""The adapter's modalities and samples, checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Sequence

from remote_payload.reconstruct.adapters import calling
from remote_payload.reconstruct.protocol import (
    Adapter,
    AdapterConfig,
    AdapterError,
    Modality,
    Sample,
    modality_problem,
)


def declared_modalities(adapter: Adapter, data: dict[str, str], config: AdapterConfig) -> tuple[Modality, ...]:
    """The adapter's modalities, checked. Raises `AdapterError`."""
    with calling("modalities"):
        modalities = tuple(adapter.modalities(data, config))
    if not modalities:
        raise AdapterError("the adapter declares no modality")
    names = [m.name for m in modalities]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise AdapterError(f"the adapter declares {', '.join(twice)} twice")
    for modality in modalities:
        problem = modality_problem(modality)
        if problem:
            raise AdapterError(f"modality {modality.name!r}: {problem}")
    return modalities


def open_samples(adapter: Adapter, data: dict[str, str], config: AdapterConfig) -> Sequence[Sample]:
    """The evaluated split's samples. Raises `AdapterError` if there are none."""
    with calling("samples"):
        samples = adapter.samples(adapter.split, data, config)
        count = len(samples)
    if not count:
        raise AdapterError(f"the split {adapter.split!r} has no samples")
    return samples
