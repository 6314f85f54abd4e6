"""Names for the shell's completion."""

from __future__ import annotations


def complete_run_id(incomplete: str) -> list[str]:
    """Run ids, newest first."""
    from orchestrator.layout import LocalLayout

    try:
        folders = sorted((p.name for p in LocalLayout.for_user().runs.iterdir() if p.is_dir()), reverse=True)
    except OSError:
        return []
    return [name for name in folders if name.startswith(incomplete)]


def complete_cluster(incomplete: str) -> list[str]:
    """Names of the profiles that a command run here would find."""
    from pathlib import Path

    from orchestrator.errors import ConfigurationError
    from orchestrator.layout import LocalLayout
    from orchestrator.profiles import find_profiles
    from orchestrator.project import find_project

    try:
        project = find_project(Path.cwd()).folder
    except ConfigurationError:
        project = None
    return [name for name in sorted(find_profiles(LocalLayout.for_user(), project)) if name.startswith(incomplete)]
