"""The sh scripts that reach the agent: pure functions from profile and request to text.

A script is one compound command that ends in `exit`, so a shell that reads it from the same standard input as the data
behind it can never take data for commands. It says what stopped it in a marked line
`=remote-eval=<nonce>=<outcome>=`; everything else that the node prints is noise.
"""

from __future__ import annotations

import base64
import re
import shlex

from orchestrator.profiles import PythonProfile

PAYLOAD_MISSING = "payload-missing"
PYTHON_MISSING = "python-missing"
MODULES_MISSING = "modules-missing"
MODULE_FAILED = "module-failed"
CONDA_MISSING = "conda-missing"
CONDA_FAILED = "conda-failed"
RUNTIME_MISSING = "runtime-missing"
ROOT_FOREIGN = "root-foreign"
ROOT_UNWRITABLE = "root-unwritable"
INSTALL_DAMAGED = "install-damaged"
INSTALLED = "installed"
READY = "ready"

_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_HEREDOC_END = "REMOTE_EVAL_END"
_NO_SITE = "-S"
"""The agent needs the standard library alone; what `site` brings in an old environment takes a second."""

# Runs before any payload is there, so it speaks for itself. No single quotes: it stands between two of them.
_INSTALL = """
import base64, hashlib, os, sys
root, sha, nonce, marker = sys.argv[1:5]
def say(outcome):
    sys.stdout.write("\\n=remote-eval=%s=%s=\\n" % (nonce, outcome)); sys.stdout.flush(); os._exit(0)
try:
    fresh = not os.path.isdir(root) or not os.listdir(root)
    if not fresh and not os.path.exists(os.path.join(root, marker)):
        say("root-foreign")
    folder = os.path.join(root, "payloads")
    os.makedirs(folder, 0o700, exist_ok=True)
    if fresh:
        os.close(os.open(os.path.join(root, marker), os.O_CREAT | os.O_WRONLY, 0o600))
    data = base64.b64decode(sys.stdin.read())
    if hashlib.sha256(data).hexdigest() != sha:
        say("install-damaged")
    temporary = os.path.join(folder, ".%s.%d" % (sha, os.getpid()))
    with open(temporary, "wb") as file:
        file.write(data); file.flush(); os.fsync(file.fileno())
    os.replace(temporary, os.path.join(folder, sha + ".pyz"))
    say("installed")
except OSError as error:
    sys.stderr.write(str(error)); sys.stderr.flush()
    say("root-unwritable")
"""


def expandable(path: str) -> str:
    """A sh word for `path` in which only a leading `~` and `$NAME` / `${NAME}` are expanded, never anything else."""
    if path == "~" or path.startswith("~/"):
        return '"$HOME"' + (expandable(path[1:]) if len(path) > 1 else "")
    words, last = [], 0
    for match in _VARIABLE.finditer(path):
        if match.start() > last:
            words.append(shlex.quote(path[last : match.start()]))
        words.append(f'"${{{match.group(1) or match.group(2)}}}"')
        last = match.end()
    if last < len(path):
        words.append(shlex.quote(path[last:]))
    return "".join(words) or "''"


def call_script(python: PythonProfile, root: str, payload_sha256: str, nonce: str, request: str) -> str:
    """Run `agent call` with `request` (base64) on its standard input, where no process list shows it."""
    body = f"py {_NO_SITE} \"$payload\" agent call - <<'{_HEREDOC_END}'\n{request}\n{_HEREDOC_END}\n"
    return _script(python, root, payload_sha256, nonce, body)


def stream_script(python: PythonProfile, root: str, payload_sha256: str, nonce: str, request: str) -> str:
    """Run `agent stream`, whose standard input is the channel's own."""
    return _script(
        python, root, payload_sha256, nonce, f'py {_NO_SITE} "$payload" agent stream {shlex.quote(request)}\n'
    )


def install_script(
    python: PythonProfile, root: str, payload_sha256: str, nonce: str, payload: bytes, marker: str
) -> str:
    """Put the payload in place: verified, atomic, in a root that is ours or new."""
    text = base64.encodebytes(payload).decode()
    arguments = f'"$root" {payload_sha256} {nonce} {marker}'
    body = f"py -c '{_INSTALL}' {arguments} <<'{_HEREDOC_END}'\n{text}{_HEREDOC_END}\n"
    return _script(python, root, None, nonce, body)


def outcome_said(nonce: str, stdout: bytes) -> str | None:
    """The outcome in the script's marked line, or None."""
    match = re.search(rb"\n=remote-eval=%s=([a-z-]+)=\n" % nonce.encode(), b"\n" + stdout)
    return match.group(1).decode() if match else None


def ready_line(nonce: str) -> bytes:
    """What `agent stream` says before it reads."""
    return f"\n=remote-eval={nonce}={READY}=\n".encode()


def _script(python: PythonProfile, root: str, payload_sha256: str | None, nonce: str, body: str) -> str:
    check = ""
    if payload_sha256 is not None:
        check = (
            f'payload="$root"/payloads/{payload_sha256}.pyz\n'
            f'[ -f "$payload" ] || {{ say {PAYLOAD_MISSING}; exit 0; }}\n'
        )
    return (
        "{\n"
        f"say() {{ printf '\\n=remote-eval={nonce}=%s=\\n' \"$1\"; }}\n"
        "umask 077\n"
        f"root={expandable(root)}\n"
        f"{_environment(python)}"
        f"{check}"
        f"{body}"
        "exit $?\n"
        "}\n"
    )


def _environment(python: PythonProfile) -> str:
    lines = []
    if python.modules:
        lines.append(
            "if ! command -v module >/dev/null 2>&1; then\n"
            'for init in "${LMOD_PKG:-/usr/share/lmod/lmod}/init/sh" "${MODULESHOME:-/usr/share/modules}/init/sh" '
            "/etc/profile.d/modules.sh /etc/profile.d/lmod.sh; do\n"
            '[ -r "$init" ] && . "$init" >/dev/null 2>&1 && break\n'
            "done\nfi\n"
            f"command -v module >/dev/null 2>&1 || {{ say {MODULES_MISSING}; exit 0; }}\n"
        )
        lines += [f"module load {shlex.quote(m)} >&2 || {{ say {MODULE_FAILED}; exit 0; }}\n" for m in python.modules]
    if python.conda_env:
        lines.append(
            'conda=$(command -v conda || ls "$HOME"/miniconda3/bin/conda "$HOME"/miniforge3/bin/conda '
            '"$HOME"/anaconda3/bin/conda /opt/conda/bin/conda 2>/dev/null | head -n 1)\n'
            f'[ -n "$conda" ] || {{ say {CONDA_MISSING}; exit 0; }}\n'
            'eval "$("$conda" shell.posix hook)" >&2\n'
            f"conda activate {shlex.quote(python.conda_env)} >&2 || {{ say {CONDA_FAILED}; exit 0; }}\n"
        )
    if python.container is None:
        lines.append(
            f"python={expandable(python.path)}\n"
            f'command -v "$python" >/dev/null 2>&1 || {{ say {PYTHON_MISSING}; exit 0; }}\n'
            'py() { "$python" "$@"; }\n'
        )
    else:
        container = python.container
        options, image = shlex.join(container.options), expandable(container.image)
        command = f'{container.runtime} exec --nv --bind "$root" {options} {image} {shlex.quote(python.path)}'
        lines.append(
            f"command -v {container.runtime} >/dev/null 2>&1 || {{ say {RUNTIME_MISSING}; exit 0; }}\n"
            'mkdir -p "$root"\n'
            f'py() {{ {command} "$@"; }}\n'
        )
    return "".join(lines)
