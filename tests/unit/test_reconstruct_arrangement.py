"""Outputs of the right shape in the wrong arrangement are told from outputs that are merely bad."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from remote_payload.reconstruct.arrangement import arrangement_finding
from remote_payload.reconstruct.protocol import Kind, Modality
from remote_payload.wire.results import Severity

SHAPE = (12, 16, 3)
COUNT = 24


def modality(kind: Kind = Kind.IMAGE, layout: str = "HWC", shape: tuple[int, ...] = SHAPE) -> Modality:
    return Modality("image", kind, layout, shape, (0.0, 1.0), "intensity")


def scenes(seed: int = 0) -> np.ndarray[Any, Any]:
    """Coloured scenes `(n, 12, 16, 3)` in 0…1, smooth and lit from above as films are."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:12, 0:16] / 16.0
    found = np.empty((COUNT, *SHAPE))
    for n in range(COUNT):
        for channel, tint in enumerate((0.9, 0.5, 0.2)):
            wave = np.sin(2 * np.pi * (x * generator.uniform(0.5, 2) + y * generator.uniform(0.5, 2)) + n)
            found[n, :, :, channel] = tint * (0.6 - 0.3 * y) + 0.15 * wave * generator.uniform(0.5, 1.5)
    return found.clip(0, 1)


def blurred(targets: np.ndarray[Any, Any], noise: float = 0.03) -> np.ndarray[Any, Any]:
    """What a fair model gives: a mixture of target, mean and noise."""
    generator = np.random.default_rng(5)
    mixed = 0.7 * targets + 0.3 * targets.mean(axis=0) + noise * generator.standard_normal(targets.shape)
    return mixed.clip(0, 1)


def found(wanted: np.ndarray[Any, Any], given: np.ndarray[Any, Any], of: Modality | None = None) -> Any:
    return arrangement_finding(of or modality(), wanted.reshape(len(wanted), -1), given.reshape(len(given), -1))


def test_a_fair_model_as_declared_is_let_through() -> None:
    assert found(scenes(), blurred(scenes())) is None


def test_swapped_channels_are_found_and_named() -> None:
    finding = found(scenes(), blurred(scenes())[..., ::-1])
    assert finding.id == "reconstruct.channels_swapped"
    assert finding.severity is Severity.ERROR
    assert finding.evidence["fitting_channel_order"] == [2, 1, 0]
    assert "blue, green, red" in finding.title


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 2, 1], [1, 2, 0]])
def test_any_order_of_channels_is_found_though_channels_are_much_alike(order: list[int]) -> None:
    """Most of each channel is the same brightness: the error as a whole hardly changes."""
    nearly_grey = 0.92 * scenes().mean(axis=-1, keepdims=True) + 0.08 * scenes()
    given = blurred(nearly_grey, 0.003)
    stored = np.empty_like(given)
    stored[..., order] = given
    finding = found(nearly_grey, stored)
    assert finding.id == "reconstruct.channels_swapped"
    assert finding.evidence["fitting_channel_order"] == order


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2), (2, 1, 0)])
def test_a_buffer_with_other_axes_is_found_and_named(order: tuple[int, ...]) -> None:
    stored = blurred(scenes()).transpose(0, *(1 + axis for axis in order)).reshape(COUNT, -1)
    finding = found(scenes(), stored)
    assert finding.id == "reconstruct.layout_mismatch"
    assert finding.evidence["fitting_layout"] == "".join("HWC"[axis] for axis in order)


def test_an_image_upside_down_is_found() -> None:
    finding = found(scenes(), blurred(scenes())[:, ::-1])
    assert finding.id == "reconstruct.layout_mismatch"
    assert "upside down" in finding.title


@pytest.mark.parametrize(
    ("spoil", "scale"), [(lambda x: x / 255.0, 255.0), (lambda x: x * 255.0, 1 / 255.0), (lambda x: 2 * x - 1, 0.5)]
)
def test_another_scale_is_found(spoil: Any, scale: float) -> None:
    finding = found(scenes(), spoil(blurred(scenes())))
    assert finding.id == "reconstruct.range_mismatch"
    assert finding.evidence["fitting_scale"] == pytest.approx(scale)


@pytest.mark.parametrize("seed", range(20))
def test_noise_fits_no_arrangement(seed: int) -> None:
    generator = np.random.default_rng(seed)
    for given in (generator.random((COUNT, *SHAPE)), 0.01 * generator.random((COUNT, *SHAPE)), scenes(seed + 100)):
        assert found(scenes(), given) is None


def test_a_constant_fits_no_arrangement() -> None:
    for value in (0.0, 0.004, 0.5, 200.0):
        assert found(scenes(), np.full((COUNT, *SHAPE), value)) is None
    tinted = np.broadcast_to(scenes().mean(axis=0)[..., ::-1], (COUNT, *SHAPE))
    assert found(scenes(), tinted) is None


def test_grey_images_have_no_order_of_channels() -> None:
    grey = np.repeat(scenes()[..., :1], 3, axis=-1)
    assert found(grey, blurred(grey)[..., ::-1]) is None


def test_few_samples_say_nothing() -> None:
    assert found(scenes()[:7], blurred(scenes())[:7, ..., ::-1]) is None


def test_transposed_mel_bands_are_found() -> None:
    generator = np.random.default_rng(3)
    wanted = np.cumsum(generator.standard_normal((COUNT, 20, 33)), axis=2)
    given = (wanted + generator.standard_normal(wanted.shape)).transpose(0, 2, 1).reshape(COUNT, -1)
    of = Modality("sound", Kind.MEL, "MT", (20, 33), None, "dB")
    finding = found(wanted, given, of)
    assert finding.id == "reconstruct.layout_mismatch"
    assert "time, band" in finding.title
