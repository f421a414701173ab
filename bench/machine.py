"""What every result carries: date, machine, versions and commit."""

import subprocess

from smolseek.train import metrics


def describe() -> dict:
    """Return date, machine, versions and commit, as JSON types."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return metrics.describe() | {"commit": git.stdout.strip() or None}
