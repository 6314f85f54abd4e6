from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from remote_payload.reconstruct.collect import Collected
from remote_payload.reconstruct.protocol import AdapterBase, AdapterError, Kind, Modality, Sample
from remote_payload.reconstruct.runner import BatchRunner, cut

_MODALITY = Modality("image", Kind.IMAGE, "HW", (2, 2), None, "1")


class Doubles(AdapterBase):
    def predict(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"image": model(batch["image"]) * 2}

    def latents(self, model: Any, batch: Any, predicted: Any) -> Any:
        return {"image": (batch["image"].sum(1), predicted["image"].sum(1))}


class OneLatent(Doubles):
    def latents(self, model: Any, batch: Any, predicted: Any) -> Any:
        return {"image": (batch["image"][:1].sum(1), predicted["image"][:1].sum(1))}


def collected(adapter: Any, folder: Path) -> Collected:
    images = torch.arange(20.0).reshape(5, 2, 2)
    # The third sample has no target, so it takes no row and no latent.
    samples = [Sample(str(n), {"image": i}, {"image": i} if n != 2 else {}) for n, i in enumerate(images)]
    rows = Collected(_MODALITY, 5, folder)
    runner = BatchRunner(adapter, nn.Identity(), samples, [_MODALITY], torch.device("cpu"), torch.float32)
    for batch in cut(range(5), 2):
        result = runner.batch(batch)
        rows.add(result.positions, result.samples, result.predicted["image"])
        rows.add_latents(result.samples, result.latents)
    return rows


def test_latents_stand_row_by_row_beside_the_targets_and_predictions(tmp_path: Path) -> None:
    found = collected(Doubles(), tmp_path).evaluated(None, False, 1, 0)
    assert found.latents is not None
    np.testing.assert_array_equal(found.latents[0], found.targets.reshape(4, 2, 2).sum(1))
    np.testing.assert_array_equal(found.latents[1], found.predictions.reshape(4, 2, 2).sum(1))


def test_latents_that_are_not_one_a_sample_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="latents of 'image'"):
        collected(OneLatent(), tmp_path)
