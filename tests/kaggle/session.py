"""Who publishes in tests, when, and by which command."""

import os
import subprocess
import sys
from pathlib import Path

from kit.kaggle import publish

ROOT = Path(publish.__file__).resolve().parents[2]
USER, KEY = "alice", "5ecre7-key-0123456789abcdef"


class FakeClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self):
        self.seconds, self.naps = 0.0, []

    def now(self):
        return self.seconds

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.seconds += seconds


def script(kaggle, build, *arguments, **variables):
    """scripts/publish.py in a process of its own."""
    command = [sys.executable, ROOT / "scripts" / "publish.py", build, *arguments]
    environment = os.environ | variables
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
