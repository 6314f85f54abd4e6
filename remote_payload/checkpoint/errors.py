"""Why a checkpoint could not be read, as types."""

from __future__ import annotations

from remote_payload.checkpoint.limits import Cost
from remote_payload.wire.results import Finding


class CheckpointError(Exception):
    """A checkpoint that cannot be read at all. `kind` is stable, `action` says what to do.

    `findings` holds what was learnt before reading stopped, so that a hostile file is still named as one.
    """

    kind = "unreadable"
    action = ""

    def __init__(self, message: str, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings
        self.cost = Cost()
        """What was spent before reading stopped, for checkpoints whose files share one budget."""


class BytesNotSentError(Exception):
    """Bytes were asked for that have not been sent to this node. It says nothing about the checkpoint, so it is no
    `CheckpointError`: nobody who judges a damaged file may take it for one."""


class MissingCheckpointError(CheckpointError):
    """There is nothing at the path."""

    kind = "missing"
    action = "Check the path; it is taken as given, on the machine that reads it."


class CheckpointIsDirectoryError(CheckpointError):
    """A folder without a layout that we know."""

    kind = "is_directory"
    action = "Name the checkpoint file inside the folder."


class NotACheckpointError(CheckpointError):
    """A file of another kind: text, empty, a foreign archive."""

    kind = "not_a_checkpoint"
    action = "Name a file that torch.save or safetensors wrote."


class TruncatedCheckpointError(CheckpointError):
    """The file ends before its description of the tensors does."""

    kind = "truncated"
    action = "Copy the file again and compare sizes; if the original is as short, the save was interrupted."


class MalformedCheckpointError(CheckpointError):
    """The file begins like a checkpoint but breaks its format's rules, or a limit meant for hostile files."""

    kind = "malformed"
    action = "Copy the file again; if the original reads the same, save the checkpoint anew."


class UnsupportedCheckpointError(CheckpointError):
    """A layout that is recognised and that this version does not read."""

    kind = "unsupported"
    action = "Save the state dict with torch.save or safetensors."


class UnreadableCheckpointError(CheckpointError):
    """The operating system refuses to read it."""

    kind = "unreadable"
    action = "Check permissions and the disk's health."
