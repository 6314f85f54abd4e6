"""Checkpoints of several files and of other frameworks' layouts, made the way their writers make them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.checkpoints import SmallNet, trained_small_checkpoint

_TWO_RANKS = """
import os, sys, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module


def work(rank, folder, columns):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    if columns:
        style = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(model, mesh, {"0": style, "2": style})
    else:
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state, "epoch": 3}, checkpoint_id=folder)
    # A rank that leaves early takes the other's connections with it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, they need not each import torch again.
    mp.start_processes(work, args=(sys.argv[1], len(sys.argv) > 2), nprocs=2, start_method="fork")
"""


def write_fsdp2_checkpoint(folder: Path, columns: bool = False) -> None:
    """What two ranks of FSDP2 save: every parameter in two row ranges, buffers whole.

    `columns`: of tensor parallelism instead, where each rank has some of the matrices' columns.
    """
    script = folder.with_suffix(".py")
    script.write_text(_TWO_RANKS)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *(["columns"] if columns else [])],
        timeout=120,
        capture_output=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"two ranks could not save: {done.stderr[-3000:].decode(errors='replace')}")


def write_dcp_checkpoint(folder: Path, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """A checkpoint that one process saves with torch.distributed.checkpoint; returns what was saved."""
    saved = state or {**trained_small_checkpoint(), "epoch": 3, "config": {"learning_rate": 1e-3, "layers": [8, 4]}}
    # Imported here: it takes a second, and every worker imports this file.
    import torch.distributed.checkpoint as dcp

    dcp.save(saved, checkpoint_id=str(folder), no_dist=True)
    return saved


def in_one_file(folder: Path) -> Path:
    """The tensors of such a folder in a file of torch's beside it."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    one = folder.with_suffix(".pt")
    dcp_to_torch_save(str(folder), str(one))
    return one


def edit_dcp_metadata(folder: Path, change: Any) -> None:
    """Let `change` work on the metadata object and write it back."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def lightning_checkpoint() -> tuple[dict[str, Any], nn.Module]:
    """The dict that Lightning 2 hands to torch.save, for a module whose net is its attribute `net`."""
    trained = trained_small_checkpoint()
    net = SmallNet()
    net.load_state_dict(trained["model_state_dict"])
    return {
        "epoch": 4,
        "global_step": 1250,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": OrderedDict((f"net.{k}", v) for k, v in trained["model_state_dict"].items()),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"completed": 5}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}": {
                "monitor": "val_loss",
                "best_model_score": torch.tensor(0.25),
                "best_model_path": "/scratch/runs/epoch=4.ckpt",
            },
            "EMAWeightAveraging": {"ema_state": {"net.extra": torch.ones(2)}},
        },
        "optimizer_states": [trained["optimizer_state_dict"]],
        "lr_schedulers": [{"T_max": 50, "last_epoch": 5, "_last_lr": [0.0009]}],
        "MixedPrecision": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "_growth_tracker": 12},
        "hparams_name": "kwargs",
        "hyper_parameters": {"learning_rate": 1e-3, "width": 8},
    }, net


def write_torch_shards(folder: Path, state: dict[str, torch.Tensor], shards: int = 2) -> dict[str, str]:
    """`pytorch_model-0000N-of-0000M.bin` and their index, as transformers writes them; returns the weight map."""
    folder.mkdir(exist_ok=True)
    names = list(state)
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        chosen = names[shard::shards]
        torch.save({n: state[n] for n in chosen}, folder / file)
        weight_map.update(dict.fromkeys(chosen, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return weight_map


def deepspeed_run() -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """float32 weights after real steps, and Adam's moments of each, by the names that DeepSpeed's engine saves."""
    torch.manual_seed(1)
    model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
    named = {f"module.{n}": p for n, p in model.named_parameters()}
    weights = {n: p.detach().clone() for n, p in named.items()}
    return weights, {n: {k: v for k, v in optimizer.state[p].items() if k != "step"} for n, p in named.items()}


def _partitions(tensors: list[torch.Tensor], stage: int, ranks: int) -> list[torch.Tensor]:
    """What each rank keeps: a range of all of them, or with stage 3 a range of each, the last padded."""
    if stage == 3:
        return [torch.cat(parts) for parts in zip(*(_partitions([t], 2, ranks) for t in tensors), strict=True)]
    flat = torch.cat([t.reshape(-1) for t in tensors])
    return list(torch.cat([flat, flat.new_zeros(-len(flat) % ranks)]).chunk(ranks))


def write_deepspeed_checkpoint(folder: Path, stage: int = 2, ranks: int = 2) -> dict[str, torch.Tensor]:
    """DeepSpeed's layout: `latest`, model states, one optimizer partition for each rank. Returns the served weights."""
    step = folder / "global_step30"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step30")
    (folder / "zero_to_fp32.py").write_text("raise SystemExit('never run')\n")
    masters, moments = deepspeed_run()
    weights = {n: p.bfloat16() for n, p in masters.items()}
    shapes = OrderedDict((n, p.shape) for n, p in weights.items())
    placeholders = {n: torch.empty(0, dtype=p.dtype) for n, p in weights.items()}
    model = {
        "module": placeholders if stage == 3 else weights,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "shared_params": {},
        "lr_scheduler": {"last_batch_iteration": 29},
        "global_steps": 30,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_config": {"train_batch_size": 8, "zero_optimization": {"stage": stage}},
        "ds_version": "0.16.4",
    }
    kept = {k: _partitions([m[k] for m in moments.values()], stage, ranks) for k in ("exp_avg", "exp_avg_sq")}
    for rank, part in enumerate(_partitions(list(masters.values()), stage, ranks)):
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        if stage == 3 or rank == 0:
            torch.save(model, step / (f"{name}_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"))
        group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "params": [0]}
        state = {"state": {0: {"step": 5, **{k: v[rank].clone() for k, v in kept.items()}}}, "param_groups": [group]}
        optimizer: dict[str, Any] = {"zero_stage": stage, "partition_count": ranks, "loss_scaler": None}
        if stage == 3:
            optimizer["fp32_flat_groups"] = [part.clone()]
            optimizer["optimizer_state_dict"] = state
        else:
            own = sum(p.numel() for p in masters.values()) - rank * len(part)
            optimizer["single_partition_of_fp32_groups"] = [part[:own].clone()]
            optimizer["base_optimizer_state"] = state
        prefix = "bf16_" if stage < 3 else ""
        torch.save(
            {"optimizer_state_dict": optimizer, "ds_config": {}, "ds_version": "0.16.4"},
            step / f"{prefix}{name}_optim_states.pt",
        )
    return weights


def all_fixture_folders_and_files(folder: Path) -> list[Path]:
    """One checkpoint of each layout that a reader must describe."""
    made = {name: folder / name for name in ("dcp", "shards", "zero2", "zero3")}
    write_dcp_checkpoint(made["dcp"])
    write_torch_shards(made["shards"], trained_small_checkpoint()["model_state_dict"])
    write_deepspeed_checkpoint(made["zero2"])
    write_deepspeed_checkpoint(made["zero3"], stage=3)
    files = {"small.pt": trained_small_checkpoint(), "lightning.ckpt": lightning_checkpoint()[0]}
    for name, value in files.items():
        torch.save(value, folder / name)
    torch.save(files["small.pt"], folder / "legacy.pt", _use_new_zipfile_serialization=False)
    whole = (folder / "small.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "plain.pkl").write_bytes(pickle.dumps({"epoch": 3, "losses": [0.5, 0.25]}))
    names = ("small.pt", "lightning.ckpt", "legacy.pt", "cut.pt", "plain.pkl")
    return [*made.values(), *(folder / n for n in names)]
