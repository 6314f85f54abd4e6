from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from remote_payload.reference.model import FilmAutoencoder
from remote_payload.reference.sizes import ReferenceSizes

pytestmark = pytest.mark.torch


def on_meta(scale: int) -> FilmAutoencoder:
    with torch.device("meta"):
        return FilmAutoencoder(ReferenceSizes.at_scale(scale))


def test_at_scale_one_it_has_the_laboratorys_parameter_count_and_entries() -> None:
    model = on_meta(1)
    assert sum(p.numel() for p in model.parameters()) == 3_500_188_290
    assert len(model.state_dict()) == 162


def test_the_entries_are_made_up_as_the_laboratory_counted_them() -> None:
    names = list(on_meta(1).state_dict())
    shapes = {name: tuple(t.shape) for name, t in on_meta(1).state_dict().items()}
    weights = [n for n in names if n.endswith(".weight")]
    assert len(weights) == 48
    assert sum(len(shapes[n]) == 2 for n in weights) == 26
    assert sum(n.endswith(".bias") for n in names) == 48
    assert sum("running_" in n for n in names) == 44
    assert sum(n.endswith("num_batches_tracked") for n in names) == 22


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.video_encoder.fc1.weight", (4096, 432000)),
        ("encoder.audio_encoder.fc1.weight", (512, 896)),
        ("encoder.text_encoder.bn2.running_var", (256,)),
        ("encoder.feature_conv.0.weight", (1536, 1536)),
        ("encoder.layer6.0.weight", (8000, 4096)),
        ("encoder.layer7_bottleneck.1.bias", (2048,)),
        ("encoder.bottleneck_to_voxels.4.weight", (83138, 16384)),
        ("decoder.layer8.0.bias", (8000,)),
        ("decoder.layer12_video.1.weight", (2048,)),
        ("decoder.layer12_video.5.weight", (4096,)),
        ("decoder.layer12_text.4.weight", (1024, 1024)),
        ("decoder.layer13_video.0.weight", (43200, 4096)),
        ("decoder.layer13_audio.weight", (896, 2048)),
        ("decoder.layer13_text.bias", (3072,)),
    ],
)
def test_an_entry_has_the_laboratorys_name_and_shape(name: str, shape: tuple[int, ...]) -> None:
    assert tuple(on_meta(1).state_dict()[name].shape) == shape


@pytest.mark.parametrize("scale", [2, 16, 32, 64, 1024])
def test_every_scale_has_the_same_entry_names(scale: int) -> None:
    assert list(on_meta(scale).state_dict()) == list(on_meta(1).state_dict())


@pytest.mark.parametrize("scale", [0, -1, 1025])
def test_a_scale_that_is_none_is_refused(scale: int) -> None:
    with pytest.raises(ValueError, match="scale"):
        ReferenceSizes.at_scale(scale)


def test_a_forward_pass_gives_the_five_outputs_in_their_sizes() -> None:
    sizes = ReferenceSizes.at_scale(64)
    model = FilmAutoencoder(sizes).eval()
    out = model(torch.rand(2, sizes.video_in), torch.rand(2, sizes.audio_in), torch.rand(2, sizes.text_in))
    assert {name: t.shape[1] for name, t in out.items()} == {
        "video_recon": sizes.frame_elements,
        "audio_recon": sizes.audio_in,
        "text_recon": sizes.text_in,
        "predicted_fmri": sizes.voxels,
        "bottleneck": sizes.trunk[-1],
    }
    assert 0 <= out["video_recon"].min() <= out["video_recon"].max() <= 1


def test_the_decoder_starts_with_kaiming_fan_out_weights_and_zero_biases() -> None:
    torch.manual_seed(0)
    linear = FilmAutoencoder(ReferenceSizes.at_scale(16)).decoder.layer13_video[0]
    assert torch.count_nonzero(linear.bias) == 0
    assert linear.weight.std().item() == pytest.approx((2 / linear.weight.shape[0]) ** 0.5, rel=0.02)


def test_the_package_and_its_sizes_import_no_torch() -> None:
    code = "import sys, remote_payload.reference, remote_payload.reference.sizes as s; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "False"


def test_info_prints_the_full_size_without_building_it(capsys: pytest.CaptureFixture[str]) -> None:
    from remote_payload.reference.__main__ import main

    assert main(["info"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["parameters"], facts["state_dict_entries"]) == (3_500_188_290, 162)
