"""`python -m remote_payload.reference prepare|train|info`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

DEFAULT_SCALE = 32


def main(arguments: Sequence[str]) -> int:
    """Exit status 0, or 2 with a sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m remote_payload.reference", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="make the demonstration data from real stimuli")
    preparing.add_argument("--out", type=Path, required=True, help="folder to write")
    preparing.add_argument("--scale", type=int, default=DEFAULT_SCALE)
    training = commands.add_parser("train", help="train the small checkpoint")
    training.add_argument("--data", type=Path, required=True, help="folder that prepare wrote")
    training.add_argument("--out", type=Path, required=True, help="checkpoint file to write")
    training.add_argument("--scale", type=int, default=None, help="must be the data's; default: the data's")
    training.add_argument("--epochs", type=int, default=None, help="0 writes the untrained model")
    training.add_argument("--threads", type=int, default=2)
    training.add_argument("--seed", type=int, default=0)
    telling = commands.add_parser("info", help="print the architecture's sizes as JSON")
    telling.add_argument("--scale", type=int, default=1)
    options = parser.parse_args(list(arguments))

    from remote_payload.reference.film import DemonstrationDataError

    try:
        if options.command == "prepare":
            return _prepare(options)
        return _train(options) if options.command == "train" else _info(options)
    except (DemonstrationDataError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def _prepare(options: argparse.Namespace) -> int:
    from remote_payload.reference.data import prepare

    manifest = prepare(options.out, options.scale)
    print(json.dumps({"data": str(options.out), "digest": manifest["digest"], "samples": manifest["samples"]}))
    return 0


def _train(options: argparse.Namespace) -> int:
    import torch

    from remote_payload.reference.data import DemonstrationData
    from remote_payload.reference.train import TrainingPlan, save, train, untrained

    torch.set_num_threads(max(1, options.threads))
    data = DemonstrationData.open(options.data)
    scale = data.sizes.scale
    if options.scale is not None and options.scale != scale:
        raise ValueError(f"the data in {options.data} is at scale {scale}, not {options.scale}: prepare it anew")
    plan = TrainingPlan(scale=scale, seed=options.seed)
    if options.epochs == 0:
        checkpoint = untrained(data, plan)
    else:
        epochs = options.epochs or plan.num_epochs
        plan = TrainingPlan(scale=scale, seed=options.seed, num_epochs=epochs, warmup_epochs=max(1, epochs // 10))
        checkpoint = train(data, plan, say=lambda line: print(line, file=sys.stderr))
    save(checkpoint, options.out)
    facts = {name: checkpoint[name] for name in ("epoch", "global_step", "val_loss", "best_val_loss")}
    print(json.dumps({"checkpoint": str(options.out), "bytes": options.out.stat().st_size, **facts}))
    return 0


def _info(options: argparse.Namespace) -> int:
    import torch

    from remote_payload.reference.model import FilmAutoencoder
    from remote_payload.reference.sizes import ReferenceSizes

    sizes = ReferenceSizes.at_scale(options.scale)
    with torch.device("meta"):
        model = FilmAutoencoder(sizes)
    facts = {
        "scale": options.scale,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_dict_entries": len(model.state_dict()),
        "sizes": sizes.facts(),
    }
    print(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
