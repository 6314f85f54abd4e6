"""The one owner of every path on this side. Nobody else joins a path to these folders."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import platformdirs

from remote_payload.wire import names

PROJECT_FILE_NAME = "remote-eval.yaml"
_APP = "remote-eval"


@dataclasses.dataclass(frozen=True)
class RunLayout:
    """One run's folder here."""

    folder: Path

    @property
    def run_id(self) -> str:
        return self.folder.name

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def log(self) -> Path:
        return self.folder / "client.log"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def results(self) -> Path:
        return self.folder / "results.json"

    @property
    def report_html(self) -> Path:
        return self.folder / "report.html"

    @property
    def report_markdown(self) -> Path:
        return self.folder / "report.md"

    @property
    def artifacts(self) -> Path:
        """Verified artifacts of the attempt that the report speaks of, as on the node: `artifacts/<job>/…`."""
        return self.folder / "artifacts"

    @property
    def diagnostics(self) -> Path:
        return self.folder / "diagnostics"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def preflight(self) -> Path:
        return self.folder / "preflight.json"

    @property
    def provenance(self) -> Path:
        return self.folder / "provenance.json"

    def artifact(self, relative: str) -> Path:
        """Where an artifact that the node named lands. Raises `WireError` for a name that could lead elsewhere."""
        return self.artifacts.joinpath(*names.check_artifact_path(relative).split("/"))

    def job_results(self, job: str) -> Path:
        """The job's own JSON document."""
        return self.artifacts / names.check_job_name(job) / f"{job}.json"


@dataclasses.dataclass(frozen=True)
class LocalLayout:
    """Data, cache and configuration folders of this user."""

    data: Path
    config: Path
    cache: Path

    @classmethod
    def for_user(cls) -> LocalLayout:
        """The platform's folders, or all below `$REMOTE_EVAL_HOME` where that is set."""
        home = os.environ.get("REMOTE_EVAL_HOME")
        if home:
            base = Path(home).expanduser().absolute()
            return cls(base / "data", base / "config", base / "cache")
        dirs = platformdirs.PlatformDirs(_APP, appauthor=False)
        return cls(dirs.user_data_path, dirs.user_config_path, dirs.user_cache_path)

    @property
    def runs(self) -> Path:
        return self.data / "runs"

    def run(self, run_id: str) -> RunLayout:
        return RunLayout(self.runs / names.check_run_id(run_id))

    @property
    def database(self) -> Path:
        """Journal and history: one SQLite file."""
        return self.data / "remote-eval.sqlite3"

    @property
    def user_profiles(self) -> Path:
        return self.config / "cluster_profiles"

    @property
    def nightly_file(self) -> Path:
        return self.config / "nightly.yaml"

    @property
    def nightly_lock(self) -> Path:
        return self.data / "nightly.lock"

    @property
    def nightly_log(self) -> Path:
        """What ticks print that launchd or cron started."""
        return self.data / "nightly.log"

    @property
    def fingerprint_cache(self) -> Path:
        """Digests of local files by fingerprint."""
        return self.cache / "digests.sqlite3"

    @property
    def payloads(self) -> Path:
        return self.cache / "payloads"

    @property
    def code_archives(self) -> Path:
        """Archives of the user's code, named by their SHA-256."""
        return self.cache / "code"

    @property
    def sockets(self) -> Path:
        """ControlMaster sockets; kept short, since a Unix socket's path is limited to about 100 bytes."""
        return self.cache / "s"

    @property
    def embedded_node(self) -> Path:
        """Keys, state and root of the node on loopback."""
        return self.data / "embedded-node"

    def demo(self, reference_key: str) -> Path:
        """Data and checkpoint of the demonstration, for one version of the reference model."""
        return self.data / "demo" / reference_key

    def make_private(self, folder: Path) -> Path:
        """Create `folder` (and parents) for this user alone, and return it."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder
