"""Tiny preference files with random pictures, for dumps on tiny pipelines."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image


def write_rankings(folder: Path, rankings: dict[str, int], sizes: tuple[tuple[int, int], ...] = ((16, 16),)) -> Path:
    """Write a ranking of so many pictures for every prompt, all pairs of each; sizes (width, height) take turns."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number, (prompt, count) in enumerate(rankings.items()):
        names = [f"{number}-{place}.png" for place in range(count)]
        for place, name in enumerate(names):
            width, height = sizes[place % len(sizes)]
            Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
        lines += [
            {"prompt": prompt, "chosen": a, "rejected": b, "ranking_id": str(number), "split": "train"}
            for a, b in combinations(names, 2)
        ]
    path = folder / "preferences.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
