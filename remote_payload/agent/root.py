"""The node root: expanding it, making it ours, and refusing every folder that is not."""

from __future__ import annotations

import os
import secrets
import stat

from remote_payload.agent import files
from remote_payload.agent.failure import AgentError
from remote_payload.wire.layout import MARKER_NAME, NodeLayout

_MARKER_TEXT = b"This folder belongs to remote-eval, which may delete what it finds in it.\n"
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def expand(path: str, what: str) -> str:
    """`path` with `~` and `$VARIABLES` of this node, absolute. Raises `AgentError` for a variable that is not set."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if "\0" in expanded or not os.path.isabs(expanded):
        raise AgentError(
            "usage",
            f"the {what} {path!r} becomes {expanded!r} on this node, which is no absolute path",
            "Write an absolute path, or one that begins with ~ or a variable that is set for non-interactive logins.",
        )
    return os.path.normpath(expanded)


def open_root(root: str) -> NodeLayout:
    """The layout of an existing, expanded root that is ours. Raises `AgentError` where it is not."""
    _check_owned_folder(root)
    layout = NodeLayout(root)
    if not _is_ours(layout.marker):
        raise AgentError(
            "unfit",
            f"{root} is not a node root: it lacks the file {MARKER_NAME}",
            "Let `remote-eval doctor` set it up, or name another node_root in the profile.",
        )
    return layout


def make_root(root: str) -> NodeLayout:
    """Create the root and its marker, private to this user, or take the one that is there already if it is ours.

    Raises `AgentError`: it is a link, somebody else's, or has contents that are not ours.
    """
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
    except OSError as error:
        raise AgentError(
            "unfit",
            f"the node root {root} cannot be created: {error.strerror}",
            "Name a node_root in the profile where you may write.",
        ) from error
    _check_owned_folder(root)
    layout = NodeLayout(root)
    if not _is_ours(layout.marker):
        _check_free_to_take(layout)
        try:
            files.create_once(layout.marker, _MARKER_TEXT)
        except OSError as error:
            raise AgentError(
                "unfit",
                f"nothing can be written in the node root {root}: {error.strerror}",
                "Free some space or quota there, or name another node_root in the profile.",
            ) from error
    return layout


def is_writable(root: str) -> bool:
    """Whether a file that is written and synced in `root` can be read back."""
    path = os.path.join(root, f".write-test-{secrets.token_hex(8)}")
    content = secrets.token_bytes(4096)
    try:
        files.write_new(path, content)
        try:
            return files.read_up_to(path, len(content) + 1) == content
        finally:
            os.unlink(path)
    except OSError:
        return False


def free_bytes(path: str) -> int:
    """What an ordinary user may still write on the file system of `path`."""
    facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize


def _check_owned_folder(root: str) -> None:
    try:
        facts = os.lstat(root)
    except FileNotFoundError:
        raise AgentError("not_found", f"the node root {root} does not exist") from None
    except OSError as error:
        raise AgentError("unfit", f"the node root {root} cannot be looked at: {error.strerror}") from error
    if not stat.S_ISDIR(facts.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(facts.st_mode) else "not a folder"
        raise AgentError("unfit", f"the node root {root} is {kind}", "Name the folder itself in the profile.")
    if facts.st_uid != os.geteuid():
        raise AgentError(
            "unfit",
            f"the node root {root} belongs to another user (uid {facts.st_uid})",
            "Name a node_root of your own in the profile.",
        )
    if facts.st_mode & _OTHERS_MAY_WRITE:
        raise AgentError(
            "unfit",
            f"other users may write in the node root {root} (mode {stat.S_IMODE(facts.st_mode):o})",
            f"Run `chmod go-w {root}` on the node, or name another node_root in the profile.",
        )


def _check_free_to_take(layout: NodeLayout) -> None:
    """Empty, or with nothing but the payloads that were installed there before the agent could run."""
    known = {os.path.basename(layout.payloads)}
    strange = sorted(name for name in os.listdir(layout.root) if name not in known and not name.startswith(MARKER_NAME))
    # Another hello may have taken the folder, and begun to use it, while we looked.
    if strange and not _is_ours(layout.marker):
        raise AgentError(
            "unfit",
            f"{layout.root} holds other files ({', '.join(map(repr, strange[:3]))}) and is not a node root",
            "Name an empty or new folder as node_root in the profile.",
        )


def _is_ours(marker: str) -> bool:
    try:
        facts = os.lstat(marker)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid()
