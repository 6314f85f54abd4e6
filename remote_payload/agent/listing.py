"""What there is to fetch: one file, or all files of a folder; and what a file is, chunk by chunk."""

from __future__ import annotations

import os
import stat
import time

from remote_payload.agent import root
from remote_payload.agent.failure import AgentError
from remote_payload.agent.manifest_memory import ManifestMemory
from remote_payload.wire.chunks import ChunkManifest, digest_file
from remote_payload.wire.folders import UnsendableError, folder_files, sendable_files
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.messages import FileList, FileManifest, FolderManifest, ListedFile, ListRequest, ReadFile


def list_files(request: ListRequest) -> FileList:
    """Raises `AgentError`: not_found, or usage for what is neither a regular file nor a folder that can be listed."""
    root.open_root(request.root)
    path = request.path if os.path.exists(request.path) else root.expand(request.path, "path")
    try:
        facts = os.stat(path)
        if stat.S_ISREG(facts.st_mode):
            return FileList(os.path.abspath(path), False, (_listed("", facts),))
        if not stat.S_ISDIR(facts.st_mode):
            raise AgentError("usage", f"{path} is neither a regular file nor a folder")
        files = tuple(_listed(name, facts) for name, facts in sorted(folder_files(path)) if stat.S_ISREG(facts.st_mode))
    except (FileNotFoundError, NotADirectoryError):
        raise AgentError("not_found", f"there is no {path} on the node") from None
    except OSError as error:
        raise AgentError("usage", f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise AgentError("usage", str(error), "Name the folder of one checkpoint.") from error
    return FileList(os.path.abspath(path), True, files)


def chunk_manifest(request: ListRequest) -> FileManifest:
    """The chunks of one file, remembered or by reading it. Raises `AgentError` as `list_files`, integrity where it
    changed."""
    listed = list_files(request)
    if listed.is_folder:
        raise AgentError("usage", f"{listed.path} is a folder", "Name a file.")
    manifest, was_remembered = _read(request, listed.path, listed.files[0])
    return FileManifest(manifest.digest, manifest.size, manifest.chunks, was_remembered)


def folder_manifest(request: ListRequest) -> FolderManifest:
    """The files of a folder that may go to another machine, and their chunks. Raises as `chunk_manifest`."""
    listed = list_files(request)
    if not listed.is_folder:
        raise AgentError("usage", f"{listed.path} is no folder", "Name a folder.")
    before = _sendable(listed.path)
    files = tuple(ReadFile(file, _read(request, os.path.join(listed.path, file.name), file)[0]) for file in before)
    if _sendable(listed.path) != before:
        raise _changed(listed.path)
    return FolderManifest(listed.path, files)


def _sendable(path: str) -> list[ListedFile]:
    try:
        return [_listed(name, facts) for name, facts in sendable_files(path)]
    except OSError as error:
        raise AgentError("usage", f"{path} cannot be read: {error.strerror}") from error
    except UnsendableError as error:
        raise AgentError("usage", str(error), error.action) from error


def _read(request: ListRequest, path: str, before: ListedFile) -> tuple[ChunkManifest, bool]:
    """The file's chunks, and whether they are remembered."""
    memory = ManifestMemory(NodeLayout(request.root), path)
    try:
        with open(path, "rb") as file:
            known = None if request.anew else memory.recall(file)
            began = time.time()
            manifest = known or digest_file(file, before.size)
            facts = os.fstat(file.fileno())
            after = _listed(before.name, facts)
            if known is None and after == before:
                memory.remember(facts, manifest, began)
    except EOFError:
        after = None
    except OSError as error:
        raise AgentError("usage", f"{path} cannot be read: {error.strerror}") from error
    if after != before:
        raise _changed(path)
    return manifest, known is not None


def _changed(path: str) -> AgentError:
    return AgentError("integrity", f"{path} changed while it was read", "Copy it when it is complete.")


def _listed(name: str, facts: os.stat_result) -> ListedFile:
    return ListedFile(name, facts.st_size, facts.st_mtime_ns, facts.st_ino)
