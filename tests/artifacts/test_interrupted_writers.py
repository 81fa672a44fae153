"""Ctrl-C at any moment of a writer's life leaves nothing beside the destination."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPTED = """
import os, signal, sys, threading
from pathlib import Path
from vitfold.storage.ordinary import write_whole
from vitfold.storage.workshop import open_workshop

signal.signal(signal.SIGINT, signal.default_int_handler)
folder, kind = Path(sys.argv[1]), sys.argv[2]
sys.setswitchinterval(1e-6)  # so that the signal comes at another line each time

def interrupt():
    while not os.listdir(folder):
        pass
    signal.raise_signal(signal.SIGINT)

interrupted = 0
for trial in range(60):
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        if kind == "workshop":
            with open_workshop(folder / "out") as workshop:
                (workshop / "file").write_bytes(b"half")
                while True:
                    thread.join(0.001)
        write_whole(folder / "out", bytes(1000))
        thread.join()
    except KeyboardInterrupt:
        interrupted += 1
    thread.join()
    left = set(os.listdir(folder)) - {"out"}
    assert not left, (trial, left)
    (folder / "out").unlink(missing_ok=True)
assert interrupted == 60, interrupted
"""


@pytest.mark.parametrize("kind", ["workshop", "file"])
def test_ctrl_c_at_any_moment_leaves_nothing(kind: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path), kind],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
