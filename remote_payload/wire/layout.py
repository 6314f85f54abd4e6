"""The one owner of every path under the node root. Nobody else joins a path there."""

from __future__ import annotations

import dataclasses
import hashlib
import posixpath
from typing import Optional

from remote_payload.wire import names
from remote_payload.wire.codec import WireError

MARKER_NAME = ".remote-eval-root"
"""Stands in the node root; nothing is ever deleted in a folder that lacks it."""
_DOOMED_PREFIX = ".deleting-"


@dataclasses.dataclass(frozen=True)
class AttemptLayout:
    """The files of one attempt. `folder` is absolute."""

    folder: str

    def _at(self, name: str) -> str:
        return posixpath.join(self.folder, name)

    @property
    def claim(self) -> str:
        return self._at("claim.json")

    @property
    def decision(self) -> str:
        return self._at("decision")

    @property
    def status(self) -> str:
        return self._at("status.json")

    @property
    def events(self) -> str:
        return self._at("events.jsonl")

    @property
    def stdout_log(self) -> str:
        return self._at("stdout.log")

    @property
    def stderr_log(self) -> str:
        return self._at("stderr.log")

    @property
    def stacks_log(self) -> str:
        return self._at("stacks.log")

    @property
    def environment(self) -> str:
        return self._at("environment.json")

    @property
    def cancel_request(self) -> str:
        return self._at("cancel")

    @property
    def supervisor_log(self) -> str:
        """What the supervisor itself has to say: empty unless it broke."""
        return self._at("supervisor.log")

    @property
    def reserve(self) -> str:
        """A few blocks kept so that the terminal record can be written on a disk that is full by then."""
        return self._at(".reserve")

    @property
    def artifacts(self) -> str:
        return self._at("artifacts")

    @property
    def manifest(self) -> str:
        return self._at("manifest.json")

    def job_artifacts(self, job: str) -> str:
        return posixpath.join(self.artifacts, names.check_job_name(job))

    def job_scratch(self, job: str) -> str:
        """What a job keeps for a later attempt, until it has ended well. Never collected."""
        return posixpath.join(self._at("scratch"), names.check_job_name(job))

    @property
    def diagnostics(self) -> tuple[str, ...]:
        """What explains a failure; collected before any artifact, and from failed attempts too."""
        return (
            self.status,
            self.events,
            self.stdout_log,
            self.stderr_log,
            self.stacks_log,
            self.environment,
            self.supervisor_log,
        )


@dataclasses.dataclass(frozen=True)
class NodeLayout:
    """Paths under the node root. `root` is absolute and already expanded (the agent's hello tells it)."""

    root: str

    def __post_init__(self) -> None:
        if not posixpath.isabs(self.root):
            raise ValueError(f"node root {self.root!r} is not absolute")

    @property
    def marker(self) -> str:
        return posixpath.join(self.root, MARKER_NAME)

    @property
    def payloads(self) -> str:
        return posixpath.join(self.root, "payloads")

    def payload(self, sha256: str) -> str:
        return posixpath.join(self.payloads, names.check_sha256(sha256) + ".pyz")

    @property
    def checkpoints(self) -> str:
        return posixpath.join(self.root, "checkpoints")

    def checkpoint_folder(self, file_digest: str) -> str:
        """One verified file and its chunk manifest; the colon of `v1:` is written as a dash."""
        return posixpath.join(self.checkpoints, names.check_file_digest(file_digest).replace(":", "-"))

    def checkpoint(self, file_digest: str) -> str:
        return posixpath.join(self.checkpoint_folder(file_digest), "file")

    def checkpoint_tree(self, folder_digest: str) -> str:
        """The files of a checkpoint that is a folder, all there and verified."""
        return posixpath.join(self.checkpoint_folder(folder_digest), "tree")

    def checkpoint_members(self, folder_digest: str) -> str:
        """The list of those files; the chunk manifest beside it is that of all of them, one behind the other."""
        return posixpath.join(self.checkpoint_folder(folder_digest), "members.json")

    def staging(self, unique: str) -> NodeLayout:
        """A root of its own, in which a checkpoint's folder is made before it is renamed into the store."""
        return NodeLayout(posixpath.join(self.checkpoints, f".assembling-{names.check_nonce(unique)}"))

    def checkpoint_part(self, file_digest: str) -> str:
        return posixpath.join(self.checkpoint_folder(file_digest), "file.part")

    def checkpoint_readable(self, file_digest: str) -> str:
        """Which bytes of the part jobs may read (`wire/parts.py`): there while a part is kept for them."""
        return posixpath.join(self.checkpoint_folder(file_digest), "readable.json")

    def checkpoint_journal(self, file_digest: str) -> str:
        return posixpath.join(self.checkpoint_folder(file_digest), "file.journal")

    def checkpoint_lock(self, file_digest: str) -> str:
        """Held (`flock`) by whoever receives the file; it stays behind, since unlinking it would part two holders."""
        return posixpath.join(self.checkpoint_folder(file_digest), "lock")

    def checkpoint_manifest(self, file_digest: str) -> str:
        return posixpath.join(self.checkpoint_folder(file_digest), "chunks.json")

    def checkpoint_verified(self, file_digest: str) -> str:
        """How the checkpoint's files stood when they were verified."""
        return posixpath.join(self.checkpoint_folder(file_digest), "verified.json")

    def checkpoint_uses(self, file_digest: str) -> str:
        """When which run located or sent the file, a line each."""
        return posixpath.join(self.checkpoint_folder(file_digest), "uses")

    @property
    def store_lock(self) -> str:
        """Held (`flock`) by whoever makes room in the store."""
        return posixpath.join(self.root, "store.lock")

    @property
    def code(self) -> str:
        return posixpath.join(self.root, "code")

    def code_folder(self, sha256: str) -> str:
        """The user's shipped code, unpacked; named by the archive's sha256."""
        return posixpath.join(self.code, names.check_sha256(sha256))

    @property
    def known_manifests(self) -> str:
        """Chunk manifests of files elsewhere on the node, one for each path that was read for them."""
        return posixpath.join(self.root, "manifests")

    def known_manifest(self, path: str) -> str:
        return posixpath.join(self.known_manifests, hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest())

    @property
    def digest_cache(self) -> str:
        """File digests already computed here, by fingerprint."""
        return posixpath.join(self.root, "digests.json")

    @property
    def leases(self) -> str:
        """Advisory GPU leases among our own runs."""
        return posixpath.join(self.root, "leases")

    def gpu_lease(self, gpu_uuid: str) -> str:
        return posixpath.join(self.leases, names.check_artifact_path(gpu_uuid) + ".lock")

    @property
    def runs(self) -> str:
        return posixpath.join(self.root, "runs")

    def run_folder(self, run_id: str) -> str:
        return posixpath.join(self.runs, names.check_run_id(run_id))

    def plan(self, run_id: str) -> str:
        return posixpath.join(self.run_folder(run_id), "plan.json")

    def attempt(self, run_id: str, attempt: int) -> AttemptLayout:
        if attempt < 1:
            raise ValueError("attempts count from 1")
        return AttemptLayout(posixpath.join(self.run_folder(run_id), f"attempt-{attempt}"))

    def new_claim(self, run_id: str, nonce: str, unique: str) -> str:
        """A folder in the making: renamed to the attempt's, or removed. Its name can never be an attempt's."""
        return posixpath.join(self.run_folder(run_id), f".claim-{names.check_nonce(nonce)}-{unique}")

    def doomed(self, folder: str) -> str:
        """Where `folder` goes, in one step, before its contents are deleted."""
        return posixpath.join(posixpath.dirname(folder), _DOOMED_PREFIX + posixpath.basename(folder))

    def is_doomed(self, name: str) -> bool:
        return name.startswith(_DOOMED_PREFIX)


def attempt_at(folder: str) -> tuple[NodeLayout, str, int]:
    """(layout, run id, attempt) of an attempt's absolute folder. Raises `WireError` for a path that is none."""
    run_folder, name = posixpath.split(folder)
    runs, run_id = posixpath.split(run_folder)
    number = name[len("attempt-") :]
    if name.startswith("attempt-") and number.isascii() and number.isdigit() and posixpath.isabs(folder):
        layout = NodeLayout(posixpath.dirname(runs))
        if int(number) > 0 and layout.attempt(run_id, int(number)).folder == folder:
            return layout, run_id, int(number)
    raise WireError(f"{folder[:200]!r} is no attempt's folder")


def part_of(path: str) -> Optional[tuple[str, str]]:
    """(its part, the list of what of that may be read) for a file of a node's store; None for a path elsewhere."""
    folder, _ = posixpath.split(path)
    checkpoints, name = posixpath.split(folder)
    try:
        layout, digest = NodeLayout(posixpath.dirname(checkpoints)), name.replace("-", ":", 1)
        if layout.checkpoint(digest) == path:
            return layout.checkpoint_part(digest), layout.checkpoint_readable(digest)
    except ValueError:
        pass
    return None


def is_part(path: str) -> bool:
    """Whether `path` is where a node's store keeps a file that has not arrived in full."""
    found = part_of(posixpath.join(posixpath.dirname(path), "file"))
    return found is not None and found[0] == path
