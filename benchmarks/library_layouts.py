"""Does a healthy file of torchvision's, timm's or transformers' layout get no warning and no error?

    python -m benchmarks.library_layouts [--steps 200] [--device auto] [--models NAME,…] [LIBRARY …]

Trains small models of whichever of the three can be imported, on stripes and on real text, writes the files that their
users write, judges each by `python -m remote_payload.health`, and prints every finding, and how many of the optimizer's
entries got the name of another parameter. Exits 1 for such a name, and if a file of a run that learned got a warning or
an error. Needs torch, numpy and the libraries; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.library_runs import TRANSFORMERS, gratings, names_in, trained_files

CLASSES, SIZE, SAMPLES = 4, 64, 16
LIBRARIES = ("torchvision", "timm", "transformers")
Files = Iterator[tuple[str, Path, list[str]]]

TORCHVISION: dict[str, dict[str, Any]] = {
    "resnet18": {"zero_init_residual": True},
    "vgg11_bn": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    "shufflenet_v2_x0_5": {},
    "densenet121": {},
    "regnet_y_400mf": {},
    "convnext_tiny": {},
    "swin_t": {},
    "vit_b_16": {"image_size": SIZE},
    "googlenet": {"init_weights": False, "aux_logits": False},
}
TIMM: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "efficientnet_lite0": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": SIZE},
    "deit3_small_patch16_224": {"img_size": SIZE, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": SIZE, "window_size": 4},
    "mixer_s32_224": {"img_size": SIZE},
}


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, steps: int, device: str) -> bool:
    """Train on stripes; whether the loss fell."""
    model.to(device).train()
    losses = []
    for _ in range(steps):
        image, label = (t.to(device) for t in gratings(SAMPLES, SIZE, CLASSES))
        loss = nn.functional.cross_entropy(model(image), label, label_smoothing=0.1)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(float(loss.detach()))
    tenth = max(1, steps // 10)
    return sum(losses[-tenth:]) < sum(losses[:tenth])


def torchvision_files(name: str, folder: Path, steps: int, device: str) -> Files:
    """What torchvision's reference scripts save: SGD for convolutions, AdamW for transformers, an averaged model."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **TORCHVISION[name]).to(device)
    arguments = argparse.Namespace(model=name, lr=0.02, momentum=0.9, batch_size=SAMPLES, epochs=10)
    if name.startswith(("vit", "swin", "convnext")):
        arguments.lr = 5e-4
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.05)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * steps)
    learned = fit(model, optimizer, schedule, steps, device)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    states = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule, "model_ema": average}
    path = folder / "checkpoint.pth"
    torch.save({**{k: v.state_dict() for k, v in states.items()}, "epoch": 4, "args": arguments}, path)
    torch.save(model.state_dict(), folder / "weights.pth")
    torch.save(copy.deepcopy(model).half().state_dict(), folder / "half.pth")
    held = names_in(optimizer, model)
    for kind, file, names in (
        ("checkpoint", "checkpoint.pth", held),
        ("weights", "weights.pth", []),
        ("float16", "half.pth", []),
    ):
        yield kind if learned else f"{kind}, did not learn", folder / file, names


def timm_files(name: str, folder: Path, steps: int, device: str) -> Files:
    """What timm's training script saves, with its groups: no decay for vectors, and smaller rates in deeper layers."""
    import timm
    import timm.optim
    import timm.utils

    for decay in (None, 0.75):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **TIMM[name]).to(device)
        optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=decay)
        average = timm.utils.ModelEmaV2(model, decay=0.99)
        learned = fit(model, optimizer, None, steps, device)
        average.update(model)
        path = folder / f"layer_decay_{decay}.pth.tar"
        arguments = argparse.Namespace(model=name, lr=1e-3, opt="adamw", batch_size=SAMPLES, model_ema_decay=0.99)
        state = {
            "epoch": 4,
            "arch": name,
            "state_dict": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "version": 2,
            "args": arguments,
            "state_dict_ema": average.module.state_dict(),
            "metric": 50.0,
        }
        torch.save(state, path)
        yield f"layer decay {decay}" + ("" if learned else ", did not learn"), path, names_in(optimizer, model)


def transformers_files(name: str, folder: Path, steps: int, _device: str) -> Files:
    for mixed in (False, True):
        below = folder / ("bfloat16" if mixed else "float32")
        below.mkdir()
        for kind, path, names in trained_files(name, below, mixed, steps):
            yield f"{kind}, {below.name}", path, names


MAKERS: dict[str, tuple[dict[str, Any], Callable[[str, Path, int, str], Files]]] = {
    "torchvision": (TORCHVISION, torchvision_files),
    "timm": (TIMM, timm_files),
    "transformers": (TRANSFORMERS, transformers_files),
}


def judge(path: Path, out: Path) -> dict[str, Any]:
    """The health document of a checkpoint, by the command that a user runs."""
    command = [sys.executable, "-m", "remote_payload.health", str(path), "--out", str(out), "--device", "cpu"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600, cwd=Path(__file__).parents[1])
    return dict(json.loads((out / "health.json").read_text()))


def report(title: str, document: dict[str, Any], names: list[str]) -> tuple[int, int]:
    """Print a file's findings; how many of them are louder than information, and how many names are wrong."""
    loud = [f for f in document["findings"] if f["severity"] != "info"]
    optimizer = (document["header"] or {}).get("optimizer")
    given = optimizer["parameters"] if optimizer else {}
    wrong = sum(1 for index, name in given.items() if name != names[int(index)])
    matched = f", {len(given)} of {len(names)} entries {optimizer['mapping']}, {wrong} wrong" if optimizer else ""
    print(f"{'LOUD' if loud else 'quiet'}  {title}: {len(document['tensors'])} tensors{matched}", flush=True)
    for finding in document["findings"]:
        shown = json.dumps(finding["evidence"])[:400] if finding in loud else ""
        print(f"       {finding['severity']:8}{finding['id']}  {finding['title']}  {finding['where'][:3]} {shown}")
    return len(loud), wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=", ".join(LIBRARIES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", default="", help="only these, by name")
    chosen = parser.parse_args()
    device = chosen.device if chosen.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    unknown = set(chosen.libraries) - set(LIBRARIES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    loud = files = wrong = 0
    for library in chosen.libraries or LIBRARIES:
        if importlib.util.find_spec(library) is None:
            print(f"absent {library} is not installed", flush=True)
            continue
        models, make = MAKERS[library]
        for name in [n for n in models if not chosen.models or n in chosen.models.split(",")]:
            with tempfile.TemporaryDirectory() as folder:
                for number, (kind, path, names) in enumerate(make(name, Path(folder), chosen.steps, device)):
                    files += 1
                    document = judge(path, Path(folder) / f"health-{number}")
                    found, misnamed = report(f"{library} {name}, {kind}", document, names)
                    loud += 0 if "did not learn" in kind else found
                    wrong += misnamed
    print(f"{files} files; {loud} warnings and errors on files of runs that learned, {wrong} wrong names of parameters")
    return 1 if loud or wrong or not files else 0


if __name__ == "__main__":
    sys.exit(main())
