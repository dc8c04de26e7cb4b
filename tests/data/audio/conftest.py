import json

import numpy as np
import pytest
import soundfile

TEXTS = ["one two", "three", "two one three", "one"]


def sine(hertz: float, seconds: float, rate: int = 16_000) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.fixture
def spoken(tmp_path):
    """Folder `spoken` with recordings 0.wav … 3.flac, and their manifest a.jsonl."""
    folder = tmp_path / "spoken"
    folder.mkdir()
    names = ["0.wav", "1.flac", "2.wav", "3.flac"]
    for i, name in enumerate(names):
        rate = 8_000 if i == 1 else 16_000
        soundfile.write(folder / name, sine(200 + 100 * i, 0.1 + 0.1 * i, rate), rate)
    rows = [{"audio": n, "target": text} for n, text in zip(names, TEXTS, strict=True)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
