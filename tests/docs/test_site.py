"""The documentation site: it can be made without a warning, and names the whole public interface."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vitfold

ROOT = Path(__file__).resolve().parents[2]


def test_the_public_interface_is_documented() -> None:
    named = set(re.findall(r"auto\w+:: vitfold\.(\w+)$", (ROOT / "docs/python.md").read_text(), re.MULTILINE))
    assert named == set(vitfold.__all__) - {"__version__"}


def test_the_site_is_made_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(tmp_path / "trees")]
    command += [str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site" / "index.html").read_text()
    captions = re.findall(r'<p class="caption"[^>]*><span class="caption-text">([^<]*)', index)
    assert captions[:5] == ["My model", "My accuracy", "My server", "My million images", "My GPU"]
    page = (tmp_path / "site" / "python.html").read_text()
    assert all(f'id="vitfold.{name}"' in page for name in ("load", "Predictor", "BundleError"))
