"""Which code and which packages a number comes from."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_OURS = ("study", "search_spaces", "trainables", "features")
PACKAGES = ("torch", "ray", "optuna", "mlflow", "transformers", "numpy", "pandas")


def packages_first() -> None:
    """Import our packages from where this one lies, though a folder before it on the path has modules of these names.

    They are plain words, and a user's working directory may have a `features` of its own.
    """
    specs = [importlib.machinery.PathFinder.find_spec(name) for name in _OURS]
    others = [spec.origin for spec in specs if spec is not None and spec.origin is not None]
    if not all(Path(origin).resolve().is_relative_to(ROOT) for origin in others):
        sys.path.insert(0, str(ROOT))


def commit() -> str:
    """Git commit of the code, with `+` and a hash of the files if they differ; outside a checkout `files:` and the hash."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # A new file is code too: models are found by their files.
        dirty = git("status", "--porcelain", "--untracked-files=all", "--", *(f"{name}/*.py" for name in _OURS))
        return git("rev-parse", "HEAD") + (f"+{_hash_of_files()[:12]}" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return f"files:{_hash_of_files()}"


def _hash_of_files() -> str:
    """Code that was shipped to a cluster has no history, but it is not just any code."""
    digest = hashlib.sha256()
    for path in sorted(path for name in _OURS for path in (ROOT / name).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:40]


def device(kind: str = "cpu") -> str:
    """Return what computes: `x86_64 AVX512`, for `cuda` with the GPU's name behind it. Such machines round differently.

    `cpu` never touches CUDA, even where there is a GPU.
    """
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if kind == "cuda" and torch.cuda.is_available() else ""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{gpu}"


def versions() -> str:
    """`python=3.11.7 torch=2.13.0 ...`."""
    found = [f"{name}={importlib.metadata.version(name)}" for name in PACKAGES]
    return " ".join([f"python={platform.python_version()}", *found])
