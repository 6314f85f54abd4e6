from __future__ import annotations

import io
import wave
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from remote_payload.reconstruct import drawing, images, panels, sound_panels, voxel_panels
from remote_payload.reconstruct.collect import Collected
from remote_payload.reconstruct.pictures import Shown, choose_shown, draw_sample, file_name, neighbour_rows, share_of
from remote_payload.reconstruct.protocol import Kind, Modality, Sample, VoxelPlaces
from remote_payload.wire.names import check_artifact_path

RNG = np.random.default_rng(0)


def decoded(png: bytes) -> NDArray[np.uint8]:
    """By FFmpeg: what anybody's viewer sees."""
    with av.open(io.BytesIO(png)) as container:
        frame = next(container.decode(video=0))
        array: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return array


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 33), (200, 300)])
def test_a_png_decodes_to_the_same_pixels(shape: tuple[int, int]) -> None:
    picture = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(images.png_bytes(picture)), picture)


def test_a_smooth_png_decodes_to_the_same_pixels() -> None:
    ramp = np.add.outer(np.arange(100), np.arange(180)).astype(np.uint8)
    picture = np.stack([ramp, ramp[::-1], 255 - ramp], axis=2)
    data = images.png_bytes(picture)
    np.testing.assert_array_equal(decoded(data), picture)
    assert len(data) < picture.nbytes / 10


def test_the_same_picture_gives_the_same_bytes() -> None:
    picture = RNG.integers(0, 256, (30, 30, 3), dtype=np.uint8)
    assert images.png_bytes(picture) == images.png_bytes(picture.copy())


def test_a_png_holds_nothing_but_pixels() -> None:
    data = images.png_bytes(np.zeros((2, 2, 3), np.uint8))
    kinds, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == int.from_bytes(data[at + 8 + length : at + 12 + length], "big")
        kinds.append(kind)
        at += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        images.png_bytes(np.zeros((2, 2, 4), np.uint8))


def test_a_wav_plays_back_the_signal_and_clips_what_is_louder_than_its_peak() -> None:
    signal = np.stack([np.linspace(-2, 2, 50), np.zeros(50)], axis=1)
    with wave.open(io.BytesIO(images.wav_bytes(signal, 16_000, peak=1.0))) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 16_000, 50)
        samples = np.frombuffer(file.readframes(50), "<i2").reshape(50, 2)
    assert (samples[0, 0], samples[-1, 0]) == (-32767, 32767)
    np.testing.assert_allclose(samples[20:30, 0] / 32767, signal[20:30, 0], atol=1e-4)


FRAME = (12, 20, 3)


def test_a_film_strip_shows_the_original_above_the_reconstruction() -> None:
    modality = Modality("v", Kind.VIDEO, "HWC", FRAME, (0.0, 1.0), "u")
    red, blue = np.zeros(FRAME), np.zeros(FRAME)
    red[..., 0], blue[..., 2] = 1.0, 1.0
    strip = panels.film_strip(modality, [("a", [red, blue]), ("b", [red, blue])]).astype(int)
    rows_of_red = np.flatnonzero((strip[..., 0] > 240) & (strip[..., 1] < 10) & (strip[..., 2] < 10))
    rows_of_blue = np.flatnonzero((strip[..., 2] > 240) & (strip[..., 1] < 10) & (strip[..., 0] < 10))
    assert rows_of_red.max() // strip.shape[1] < rows_of_blue.min() // strip.shape[1]


@pytest.mark.parametrize(
    ("layout", "shape"),
    [("HWC", (4, 6, 3)), ("CHW", (3, 4, 6)), ("HW", (4, 6)), ("CHW", (1, 4, 6)), ("HWC", (4, 6, 5))],
)
def test_every_layout_of_an_image_becomes_a_picture(layout: str, shape: tuple[int, ...]) -> None:
    modality = Modality("i", Kind.IMAGE, layout, shape, (0.0, 1.0), "u")
    (frame,) = panels.as_frames(modality, RNG.random(shape))
    assert panels.as_rgb(frame, 0.0, 1.0).shape == (4, 6, 3)


@pytest.mark.parametrize("layout", ["THWC", "TCHW", "CTHW"])
def test_layouts_of_a_video_give_the_same_frames(layout: str) -> None:
    video = RNG.random((5, 4, 6, 3))
    arranged = np.transpose(video, ["THWC".index(axis) for axis in layout])
    modality = Modality("v", Kind.VIDEO, layout, arranged.shape, (0.0, 1.0), "u")
    np.testing.assert_array_equal(np.stack(panels.as_frames(modality, arranged)), video)


@pytest.mark.parametrize(
    "modality",
    [
        Modality("c", Kind.CODES, "KT", (8, 35), (0.0, 1023.0), "code"),
        Modality("c", Kind.CODES, "TK", (35, 8), (0.0, 1023.0), "code"),
        Modality("m", Kind.MEL, "MT", (80, 900), None, "log power"),
        Modality("t", Kind.TEXT_EMBEDDING, "D", (1000,), None, "1"),
        Modality("t", Kind.TEXT_EMBEDDING, "D", (3,), None, "1"),
    ],
)
def test_matrices_are_drawn_at_a_readable_size(modality: Modality) -> None:
    original = RNG.random(modality.shape) * 100
    height, width, _ = panels.matrices(modality, [original, original * 0]).shape
    assert 100 <= height <= 900
    assert 300 <= width <= 1100


def test_a_silent_waveform_is_drawn() -> None:
    modality = Modality("w", Kind.AUDIO_WAVEFORM, "T", (5,), None, "1")
    assert sound_panels.waveforms(modality, [np.zeros(5), np.zeros(5)]).shape[1] > 300


def test_even_a_film_strip_of_noise_stays_below_four_hundred_kilobytes() -> None:
    modality = Modality("v", Kind.VIDEO, "HWC", (28, 50, 3), (0.0, 1.0), "u")
    noise = RNG.random((10, 28, 50, 3))
    frames = [(f"frame {i}", [noise[i], noise[i + 5]]) for i in range(5)]
    assert len(images.png_bytes(panels.film_strip(modality, frames))) < 400_000


def test_the_map_shows_correlated_voxels_in_red_and_no_others() -> None:
    grid = np.stack(np.unravel_index(np.arange(6 * 8 * 12), (6, 8, 12)), axis=1)
    values = np.where(grid[:, 1] < 4, 0.5, 0.0)
    picture = voxel_panels.slices(values, VoxelPlaces((6, 8, 12), grid), 0.5).astype(int)
    reddish = (picture[..., 0] - picture[..., 2]) > 100
    brain = picture[: picture.shape[0] - 40]
    assert reddish[: len(brain)].any()
    first_tile = reddish[: len(brain) // 2]
    assert first_tile[: len(first_tile) // 3].sum() < first_tile[len(first_tile) // 2 :].sum()


@pytest.mark.parametrize("null", [np.empty(0), np.zeros(50), RNG.standard_normal(500) * 0.1])
def test_a_histogram_is_drawn_with_or_without_a_null(null: NDArray[np.float64]) -> None:
    observed = np.append(RNG.random(100) - 0.5, np.nan)
    assert voxel_panels.histogram(observed, null).shape == (260, 620, 3)


def test_every_character_of_a_caption_has_its_own_glyph() -> None:
    drawn = set()
    for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;'-+=/()%_#|":
        picture = drawing.canvas(7, 5)
        drawing.write(picture, 0, 0, character)
        drawn.add(picture.tobytes())
    assert len(drawn) == len("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;'-+=/()%_#|")


def test_text_that_leaves_the_picture_is_cut_off_and_does_not_fail() -> None:
    picture = drawing.canvas(5, 9)
    drawing.write(picture, -3, -4, "too long for this ☃", size=2)
    assert picture.shape == (5, 9, 3)


def test_pictures_show_the_best_the_median_and_the_worst() -> None:
    errors = {p: float((p * 7) % 20) for p in range(20)}
    shown = {s.why: errors[s.position] for s in choose_shown(errors, 3)}
    assert shown == {"best": 0.0, "median": 9.0, "worst": 19.0}


@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 7, 20, 99])
def test_as_many_samples_are_shown_as_are_wanted_each_once(wanted: int) -> None:
    shown = choose_shown({p: float(p) for p in range(20)}, wanted)
    positions = [s.position for s in shown]
    assert len(positions) == min(wanted, 20)
    assert positions == sorted(set(positions))


@pytest.mark.parametrize(
    ("row", "first", "last"), [(0, 0, 30), (30, 0, 30), (7, 0, 30), (3, 2, 6), (3, 3, 3), (9, 8, 17)]
)
def test_neighbours_hold_the_row_and_stay_within_the_run(row: int, first: int, last: int) -> None:
    rows = neighbour_rows(row, first, last)
    assert row in rows
    assert first <= rows[0] <= rows[-1] <= last
    assert len(rows) == min(panels.MAX_FRAMES, last - first + 1)


@pytest.mark.parametrize("name", ["video", "../../etc", "a b", "-x", "é", "", "x" * 300])
def test_a_modalitys_name_cannot_lead_out_of_the_folder(name: str) -> None:
    check_artifact_path(f"reconstruct/pictures/sample-01-{file_name(name)}.png")
    check_artifact_path(f"reconstruct/pictures/{file_name(name)}-map.png")


def evaluated(modality: Modality, count: int, folder: Path, group: str = "") -> tuple[Collected, list[Sample]]:
    """Noise: what compresses least."""
    rows = Collected(modality, count, folder)
    top = modality.value_range[1] if modality.value_range else 1.0
    samples = []
    for position in range(count):
        original, given = RNG.random((2, *modality.shape), dtype=np.float32) * top
        sample = Sample(f"sample-{position}", {}, {modality.name: original}, group=group)
        rows.add([position], [sample], given[None])
        samples.append(Sample(sample.id, {}, {}, group=group))
    return rows, samples


@pytest.mark.parametrize(
    ("modality", "group"),
    [
        (Modality("v", Kind.VIDEO, "HWC", (90, 160, 3), (0.0, 1.0), "u"), "film"),
        (Modality("i", Kind.IMAGE, "HWC", (512, 512, 3), (0.0, 1.0), "u"), ""),
    ],
)
def test_fifty_samples_leave_the_report_below_ten_megabytes(modality: Modality, group: str, tmp_path: Path) -> None:
    rows, samples = evaluated(modality, 10, tmp_path, group)
    written: dict[str, bytes] = {}
    share = share_of([modality], 50)
    for position in (0, 5):
        shown = Shown(position, "best")
        (entry,) = draw_sample(
            rows, samples, shown, position, "reconstruct", written.__setitem__, rows.targets[::-1], share
        )
        assert (entry["role"], entry["kind"]) == ("comparison", "image")
    assert max(len(data) for data in written.values()) * 50 * 4 / 3 < 8_500_000
    # Small, and still to be looked at.
    assert all(decoded(data).shape[1] > 250 for data in written.values())


def test_sounds_are_cut_to_their_share_and_say_so(tmp_path: Path) -> None:
    modality = Modality("w", Kind.AUDIO_WAVEFORM, "T", (40_000,), (-1.0, 1.0), "1", sample_rate_hz=8_000)
    rows, samples = evaluated(modality, 1, tmp_path)
    written: dict[str, bytes] = {}
    share = share_of([modality], 50)
    entries = draw_sample(rows, samples, Shown(0, "best"), 1, "reconstruct", written.__setitem__, None, share)
    sounds = [e for e in entries if e["kind"] == "audio"]
    assert [e["role"] for e in sounds] == ["original", "reconstruction"]
    assert all("the first 1.1 s of 5.0 s" in e["caption"] for e in sounds)
    assert sum(len(data) for name, data in written.items() if name.endswith(".wav")) <= share.sound_bytes
    with wave.open(io.BytesIO(written["sounds/sample-01-w-original.wav"])) as file:
        assert file.getframerate() == 8_000


def test_the_nearest_training_sample_stands_below_the_difference() -> None:
    modality = Modality("i", Kind.IMAGE, "HWC", FRAME, (0.0, 1.0), "u")
    grey, green = np.full(FRAME, 0.5), np.zeros(FRAME)
    green[..., 1] = 1.0
    without = panels.film_strip(modality, [("a", [grey, grey])]).astype(int)
    picture = panels.film_strip(modality, [("a", [grey, grey, green])]).astype(int)
    is_green = (picture[..., 1] > 240) & (picture[..., 0] < 10) & (picture[..., 2] < 10)
    assert np.flatnonzero(is_green.any(axis=1)).min() > 0.7 * picture.shape[0]
    assert picture.shape[0] > without.shape[0]


def test_a_tone_is_a_line_at_its_frequency_in_the_spectrogram() -> None:
    rate = 8_000
    modality = Modality("w", Kind.AUDIO_WAVEFORM, "T", (rate,), (-1.0, 1.0), "1", sample_rate_hz=rate)
    times = np.arange(rate) / rate
    picture = sound_panels.waveforms(modality, [np.sin(2 * np.pi * 1_000 * times)] * 2).astype(int)
    yellow = (picture[..., 0] > 150) & (picture[..., 1] > 190) & (picture[..., 2] < 110)
    lines = np.flatnonzero(yellow.sum(axis=1) > 500)
    # 1 kHz of 4: a quarter of the spectrogram's height from below, in the two signals and not in the difference.
    groups = np.split(lines, np.flatnonzero(np.diff(lines) > 1) + 1)
    assert len(groups) == 2
    first_tile_top = 10 + sound_panels.ENVELOPE_HEIGHT
    expected = first_tile_top + 0.75 * sound_panels.SPECTROGRAM_HEIGHT
    assert abs(groups[0].mean() - expected) < 3


def test_a_picture_of_fine_stripes_shrinks_to_their_mean() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    assert set(np.unique(drawing.resized(stripes, 16, 16))) == {100}


@pytest.mark.parametrize("side", [1, 7, 40, 41, 300])
def test_a_flat_picture_stays_flat_at_any_size(side: int) -> None:
    flat = np.full((41, 13, 3), 77, np.uint8)
    resized = drawing.resized(flat, side, side)
    assert resized.shape == (side, side, 3)
    assert set(np.unique(resized)) == {77}


def test_codes_that_differ_are_red_however_near_their_numbers_are() -> None:
    modality = Modality("c", Kind.CODES, "KT", (1, 2), (0.0, 1023.0), "code")
    picture = panels.matrices(modality, [np.array([[5, 5]]), np.array([[5, 6]])]).astype(int)
    reddish = (picture[..., 0] > 150) & (picture[..., 1] < 60)
    assert reddish.any(axis=0)[: picture.shape[1] // 2].sum() == 0
    assert reddish.any(axis=0)[picture.shape[1] // 2 :].any()
