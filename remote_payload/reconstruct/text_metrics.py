"""The metrics of text embeddings."""

from __future__ import annotations

import numpy as np

from remote_payload.reconstruct.identification import identification_metrics
from remote_payload.reconstruct.measured import Evaluated, Evidence, Metric, baseline_rows
from remote_payload.reconstruct.sample_metrics import error_metric, evidence_beside_mean, similarity_metric

_TOP = (1, 5)


def embedding_metrics(evaluated: Evaluated) -> tuple[list[Metric], Evidence]:
    """Centred cosine, two-way identification and top 1 and 5 with equal targets as one, squared error."""
    error, gain = error_metric(evaluated, "mse")
    centre, source = evaluated.train_mean, "train mean"
    if centre is None:
        centre, source = evaluated.targets.mean(axis=0, dtype=np.float64), "mean of the evaluated targets"
    similarity = similarity_metric(evaluated, "centred_cosine", centre, {"centred_on": source})
    found = [similarity.metric, error.metric]
    found += identification_metrics(
        evaluated,
        "text_identification",
        evaluated.predictions,
        evaluated.targets,
        baseline_rows(evaluated),
        {"centred_on": source, "equal_targets": "one candidate"},
        centre,
        _TOP,
    )
    evidence = evidence_beside_mean(evaluated, error, gain, similarity.metric, similarity.null)
    return found, evidence
