"""Which pictures go into the page: checked by their bytes, grouped by sample, within a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.layout import RunLayout
from orchestrator.report.format import cut, words
from orchestrator.report.media import Media, UnsafeMediaError, load

LARGE_PIXELS = 480


@dataclasses.dataclass(frozen=True)
class Shown:
    """One picture of the page with its checked content."""

    kind: str
    path: str
    title: str
    caption: str
    alt: str
    media: Media

    @property
    def is_panorama(self) -> bool:
        """So wide that it wants a row of its own."""
        return bool(self.media.width and self.media.height and self.media.width > 2.6 * self.media.height)


@dataclasses.dataclass(frozen=True)
class Group:
    """Pictures that belong side by side: one sample of one modality."""

    title: str
    pictures: tuple[Shown, ...]

    @property
    def is_large(self) -> bool:
        """Whether they hold detail (sheets, maps) that a thumbnail would lose."""
        return any((p.media.width or 0) >= LARGE_PIXELS for p in self.pictures)


@dataclasses.dataclass(frozen=True)
class Gallery:
    """What is shown, and a sentence for each picture that is not."""

    groups: tuple[Group, ...]
    left_out: tuple[str, ...]


def gallery(run: RunLayout, pictures: Sequence[Mapping[str, Any]], budget: int) -> Gallery:
    """Load pictures in their order until their `data:` URIs would exceed `budget` characters."""
    groups: dict[tuple[Any, ...], list[Shown]] = {}
    left_out: list[str] = []
    for picture in pictures:
        path = picture["path"]
        try:
            media = load(run.artifact(path), picture["kind"])
        except UnsafeMediaError as error:
            left_out.append(f"{path}: {error}")
            continue
        if media.uri_length > budget:
            left_out.append(f"{path}: left out to keep this report small; it is in the run's folder")
            continue
        budget -= media.uri_length
        key = (picture["job"], picture["modality"], picture["sample"])
        groups.setdefault(key, []).append(_shown(picture, media))
    return Gallery(tuple(Group(_group_title(k), tuple(v)) for k, v in groups.items()), tuple(left_out))


def _shown(picture: Mapping[str, Any], media: Media) -> Shown:
    role, title = picture["role"], picture["title"]
    name = title or words(role or picture["path"].rsplit("/", 1)[-1])
    about = [name, picture["caption"], f"sample {picture['sample']}" if picture["sample"] is not None else None]
    return Shown(
        kind=picture["kind"],
        path=picture["path"],
        title=cut(name),
        caption=cut(picture["caption"] or ""),
        alt=cut(", ".join(part for part in about if part)),
        media=media,
    )


def _group_title(key: tuple[Any, ...]) -> str:
    job, modality, sample = key
    parts = [words(modality) if modality else words(job)]
    if sample is not None:
        parts.append(f"sample {sample}")
    return cut(", ".join(parts), 120)
