"""Numbers, sizes, times and nested values as people read them. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

MAX_CELL = 400
_ABBREVIATIONS = {
    "bold": "BOLD",
    "clip": "CLIP",
    "cpu": "CPU",
    "cuda": "CUDA",
    "fid": "FID",
    "fmri": "fMRI",
    "gpu": "GPU",
    "lpips": "LPIPS",
    "mae": "MAE",
    "mse": "MSE",
    "n": "n",
    "psnr": "PSNR",
    "r": "r",
    "r2": "R²",
    "sdr": "SDR",
    "si": "SI",
    "ssim": "SSIM",
}
_BINARY = ("bytes", "KiB", "MiB", "GiB", "TiB")


def number_text(value: float | int | None) -> str:
    """Four significant digits; whole numbers in full with thin spaces; an em dash for None."""
    if value is None:
        return "—"
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e6):
        return f"{int(value):,}".replace(",", "\u202f").replace("-", "\u2212")
    text = f"{value:.4g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "\u2212")


def bytes_text(count: int | float) -> str:
    """Bytes in binary units with three significant digits."""
    size, unit = float(count), 0
    while size >= 1024 and unit < len(_BINARY) - 1:
        size, unit = size / 1024, unit + 1
    return f"{int(size)} bytes" if unit == 0 else f"{size:.3g} {_BINARY[unit]}"


def seconds_text(seconds: float | int) -> str:
    """Seconds as `0.4 s`, `2 min 5 s`, `3 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def words(name: str) -> str:
    """`second_moment_stalled` → `Second moment stalled`, the field's abbreviations as the field writes them."""
    parts = [_ABBREVIATIONS.get(part, part) for part in name.replace("_", " ").split()]
    if parts and parts[0] not in _ABBREVIATIONS.values():
        parts[0] = parts[0][:1].upper() + parts[0][1:]
    return " ".join(parts)


def cell(value: Any) -> str:
    """Any JSON value as one short text."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number_text(value)
    if isinstance(value, str):
        return cut(value)
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return f"{len(value)} entries"
    if isinstance(value, list) and all(v is None or isinstance(v, (str, int, float, bool)) for v in value):
        return cut(", ".join(cell(v) for v in value)) if value else "none"
    return cut(json.dumps(value, ensure_ascii=False, sort_keys=True))


def flatten(value: Mapping[str, Any], limit: int = 60, prefix: str = "") -> list[tuple[str, str]]:
    """A nested object as (dotted name, text) pairs, at most `limit`, with a last pair that counts the rest."""
    pairs = list(_leaves(value, prefix))
    if len(pairs) > limit:
        return [*pairs[: limit - 1], ("…", f"{len(pairs) - limit + 1} more in results.json")]
    return pairs


def command_text(results: Mapping[str, Any]) -> str | None:
    """The command that asks for this run again; None where the plan does not tell cluster and checkpoint."""
    run = results["run"]
    if not run["cluster"] or not run["checkpoint"]:
        return None
    words_ = ["remote-eval", "--cluster", run["cluster"], "--checkpoint", run["checkpoint"]]
    if run["config"]:
        words_ += ["--config", run["config"]]
    if isinstance(run["settings"].get("num_samples"), int):
        words_ += ["--num-samples", str(run["settings"]["num_samples"])]
    if run["jobs"]:
        words_ += ["--jobs", ",".join(run["jobs"])]
    return shlex.join(words_)


def _leaves(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, item in value.items():
        where = f"{prefix}{name}"
        if isinstance(item, dict) and item:
            yield from _leaves(item, f"{where}.")
        else:
            yield cut(where, 200), cell(item)


def brief(text: str, limit: int) -> str:
    """The start of `text` within `limit` characters, cut after a sentence, else a word; an ellipsis stands for more."""
    if len(text) <= limit:
        return text
    head = text[:limit]
    sentence = max(head.rfind(". "), head.rfind("; "))
    end = sentence + 1 if sentence > limit // 3 else max(head.rfind(" "), limit // 2)
    return head[:end].rstrip(" ;") + " …"


def cut(text: str, limit: int = MAX_CELL) -> str:
    """At most `limit` characters of `text`, with an ellipsis where there was more."""
    return text if len(text) <= limit else text[:limit] + " …"
