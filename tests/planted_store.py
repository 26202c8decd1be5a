"""Feature stores whose truth is known: a quality planted at chosen layers, noise everywhere else."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from probekit._types import row_id
from probekit.store import open_store

BLOCKS, WIDTH = 3, 8


def planted_store(
    path: Path,
    *,
    signal: dict[int, float],
    seed: int,
    pairs: int = 400,
    ties: float = 0.0,
    broken: int = 0,
    control: str | None = None,
    prompts: str | None = None,
    coordinates: Sequence[tuple[str, int]] = (("0.005", 0),),
    further: bool = False,
    of: int | None = None,
    dataset: str = "planted",
    told: Mapping[int, str] | None = None,
    metadata: bool = False,
    noise: int | None = None,
) -> Path:
    """Write a store of `pairs` lone pairs at layers 0 to 3, 8 channels wide.

    Property: at a layer in `signal` one direction carries strength x quality, where the better picture of a pair of
    source ``easy`` has the higher quality. Pairs of source ``none`` (a quarter) are judged by a coin, and layers not in
    `signal` know nothing. The first picture of each of the first `broken` pairs has no finite features. Noise is drawn
    anew for each of the `coordinates` (sigma, draw). With `further`, layer 4 is the output point, and there is pooling
    ``text``, 3 channels wide and absent at layers 3 and 4, which tells the pictures of a pair apart from layer 1 on:
    there its channel 0 is the quality.

    Stores `of` one number are of one backbone, whose directions they share; `dataset` names the judgements, and `told`
    gives the prompts of some pairs. With `metadata`, generators g0, g1 and g2 differ in quality, files grow with it,
    and all pictures are equally wide. Of two stores that differ in `noise`, the same pairs have other features.
    """
    rng = np.random.default_rng(seed)
    quality = rng.normal(size=(pairs, 2))
    own = np.random.default_rng([seed, 1])
    generator = own.integers(0, 3, size=(pairs, 2))
    quality += 0.8 * (generator - 1) * metadata
    directions = None if of is None else np.random.default_rng([of, 2]).normal(size=(BLOCKS + 2, WIDTH))
    source = np.where(np.arange(pairs) % 4 == 3, "none", "easy")
    label = np.where(source == "easy", quality[:, 0] > quality[:, 1], rng.random(pairs) < 0.5).astype(float)
    label[rng.random(pairs) < ties] = 0.5
    texts = [(told or {}).get(pair, f"prompt {seed} {pair}") for pair in range(pairs)]
    of = seed if of is None else of
    rows = pd.DataFrame(
        [
            {
                "row_id": row_id(digest, prompt),
                "prompt": prompt,
                "image_id": f"{pair}-{side}.png",
                "image_sha256": digest,
                "width": 32,
                "height": 32,
                "file_bytes": 100,
                "status": 0,
            }
            for pair, prompt in enumerate(texts)
            for side in "ab"
            if (digest := hashlib.sha256(f"{seed} {pair} {side}".encode()).digest())
        ]
    )

    if noise is not None:
        rng = np.random.default_rng([seed, 3, noise])

    def drawn() -> dict[tuple[str, int], np.ndarray]:
        features = {}
        for layer in range(BLOCKS + 1 + further):
            values = rng.normal(size=(len(rows), WIDTH))
            direction = rng.normal(size=WIDTH) if directions is None else directions[layer]
            values += signal.get(layer, 0.0) * np.outer(quality.ravel(), direction / np.linalg.norm(direction))
            values[: 2 * broken : 2] = np.nan
            features["mean", layer] = values.astype(np.float32)
        for layer in range(BLOCKS * further):
            values = rng.normal(size=(len(rows), 3)).astype(np.float32)
            values[:, 0] = quality.ravel() if layer == 1 else values[:, 0]
            values[1::2] = values[::2] if layer == 0 else values[1::2]
            features["text", layer] = values
        return features

    names = ["input of blocks.0", *(f"blocks.{block}" for block in range(BLOCKS)), *["input of proj_out"] * further]
    more = {"poolings": {"mean": "mean over image tokens", "text": "mean over text tokens"}}
    more |= {"pooling_layers": {"text": list(range(BLOCKS))}}
    writer = open_store(
        path,
        config={
            "layers": [{"index": k, "name": name, "stream": "image"} for k, name in enumerate(names)],
            "poolings": {"mean": "mean over image tokens"},
            "seed": of,
            "random_weights": control,
            **({"prompts": prompts} if prompts else {}),
            **(more if further else {}),
        },
        describe={
            "name": f"planted-{of}",
            "n_blocks": BLOCKS,
            "width": WIDTH,
            "n_parameters": 1000 * (of + 1),
            "random_weights": control,
            "training_images": None,
            **({"prompts": prompts} if prompts else {}),
        },
    )
    for sigma, draw in coordinates:
        features = drawn()
        for block in writer.plan(rows[["row_id", "prompt"]], sigma=sigma, draw=draw, rows_per_shard=300):
            part = rows.set_index("row_id").loc[list(block.row_ids)].reset_index()
            order = rows.reset_index().set_index("row_id")["index"].loc[list(block.row_ids)].to_numpy()
            with writer.claim(block, sigma=sigma, draw=draw) as mine:
                assert mine
                taken = {key: values[order] for key, values in features.items()}
                writer.write_shard(block, sigma=sigma, draw=draw, timestep=5.0, rows=part, features=taken)
    split = np.array(["train"] * 5 + ["validation"] * 2 + ["test"] * 3)[np.arange(pairs) % 10]
    ids = rows["row_id"].to_numpy()
    seen = {
        f"model_{side}": [f"g{number}" for number in column] for side, column in zip("ab", generator.T, strict=True)
    }
    for side, column in zip("ab", quality.T, strict=True):
        seen[f"bytes_{side}"] = np.round(1000 * np.exp(0.2 * (column + own.normal(size=pairs)))).astype(int)
        seen |= {f"{of_it}_{side}": pd.array([512] * pairs, dtype="Int64") for of_it in ("width", "height")}
        seen[f"format_{side}"] = np.array(["PNG", "JPEG", ""])[own.integers(0, 3, pairs)]
    seen["a_listed_first"] = own.random(pairs) < 0.5
    writer.write_judgements(
        dataset,
        pd.DataFrame(
            {
                "pair_id": [f"{seed}-{pair}" for pair in range(pairs)],
                "row_a": ids[0::2],
                "row_b": ids[1::2],
                "label": label,
                "weight": 1.0,
                "strength": np.nan,
                "n_votes": pd.array([pd.NA] * pairs, dtype="Int64"),
                "group": texts,
                "split": split,
                "source": source,
                "model_a": "",
                "model_b": "",
                "ranking_id": "",
            }
            | (seen if metadata else {})
        ),
    )
    return path
