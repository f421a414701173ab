"""Generated texts for training."""

import json
import random
from pathlib import Path


def write_words(path: Path, documents: int) -> Path:
    """Write `documents` documents of 60 random words as JSON lines; the words are always the same."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("re", "un", "over", "fore", "") for b in ("run", "see", "do", "call", "told", "name")]
    lines = (json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(documents))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
