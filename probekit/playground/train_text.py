"""Train the playground's two CLIP text encoders against a throw-away picture network, contrastively.

Every picture is scored against the captions of its batch and against hard negatives of its own caption: one attribute
changed, the two objects' colours or shapes swapped, or the relation reversed. The picture network is then discarded.
"""

import logging
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from probekit.playground.architectures import MAX_TOKENS, TEXT_WIDTH, build_tokenizer, new_text_encoder
from probekit.playground.checkpoint import load_training, save_training, write_tensors
from probekit.playground.scenes import BACKGROUNDS, COLOURS, NUMBERS, RELATIONS, SHAPES, SIZES
from probekit.playground.train_vae import to_pixels

logger = logging.getLogger(__name__)

NEGATIVES = 4
LOG_EVERY = 200
_PLURALS = {plural: shape for shape, plural in SHAPES.items()}
_GROUPS = (tuple(COLOURS), tuple(SHAPES), tuple(SHAPES.values()), tuple(SIZES), tuple(BACKGROUNDS))


class PictureNetwork(torch.nn.Module):
    """The throw-away partner: a small CNN that keeps positions, with one head for each text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 24, 4, stride=2, padding=1),
            torch.nn.GELU(),
            torch.nn.Conv2d(24, 48, 4, stride=2, padding=1),
            torch.nn.GELU(),
            torch.nn.Conv2d(48, 64, 4, stride=2, padding=1),
            torch.nn.GELU(),
            torch.nn.Flatten(),
            torch.nn.Linear(64 * 16, 256),
            torch.nn.GELU(),
        )
        self.heads = torch.nn.ModuleList([torch.nn.Linear(256, TEXT_WIDTH) for _ in range(2)])
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return one normalised embedding (B, 64) for each text encoder."""
        hidden = self.body(pixels)
        return [functional.normalize(head(hidden), dim=-1) for head in self.heads]


def hard_negative(caption: str, rng: random.Random) -> str:
    """Return a caption that is wrong for the picture in one respect only."""
    words = caption.split()
    relation = next((name for name in RELATIONS if f" {name} " in caption), None)
    if relation is not None and rng.random() < 0.6:
        first, rest = caption.split(f" {relation} ")
        second, ground = rest.split(" on ")
        a, b = first.split(), second.split()  # article, size, colour, shape
        kind = rng.choice(("colours", "shapes", "relation"))
        if kind == "relation":
            others = [name for name in RELATIONS if name != relation]
            return f"{first} {rng.choice([RELATIONS[relation], *others])} {second} on {ground}"
        place = 2 if kind == "colours" else 3
        a[place], b[place] = b[place], a[place]
        return f"{' '.join(a)} {relation} {' '.join(b)} on {ground}"
    if words[0] in NUMBERS and rng.random() < 0.4:
        number = rng.choice([name for name in NUMBERS if name != words[0]])
        noun = _PLURALS.get(words[3], words[3])
        return " ".join([number, *words[1:3], noun if number == "one" else SHAPES[noun], *words[4:]])
    place = rng.choice([index for index, word in enumerate(words) if any(word in group for group in _GROUPS)])
    group = next(group for group in _GROUPS if words[place] in group)
    words[place] = rng.choice([word for word in group if word != words[place]])
    return " ".join(words)


def train_text(
    pictures: torch.Tensor,
    captions: list[str],
    *,
    out: Path,
    steps: int,
    batch: int,
    seed: int,
    device: str,
    save_every: int,
) -> None:
    """Train, or continue training, and write the tokenizer and ``text.safetensors`` with both encoders."""
    tokenizer = build_tokenizer(captions, out / "tokenizer")
    modules: dict[str, torch.nn.Module] = {
        "text_encoder": new_text_encoder(tokenizer, seed=seed + 1).to(device),
        "text_encoder_2": new_text_encoder(tokenizer, seed=seed + 2).to(device),
    }
    encoders = list(modules.values())
    network = PictureNetwork().to(device)
    modules["network"] = network
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    state = out / "text.state.safetensors"
    settings = {"steps": steps, "batch": batch, "seed": seed}
    meta: dict[str, Any] = {"step": 0, "curve": []} | settings
    if state.exists():
        meta = load_training(state, modules=modules, optimiser=optimiser, settings=settings)
    identities = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
    start, first = time.perf_counter(), meta["step"]
    for step in range(meta["step"], steps):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rng = random.Random(seed * 1_000_003 + step)
        chosen = torch.randint(len(captions), (batch,), generator=draw)
        positives = [captions[index] for index in chosen.tolist()]
        negatives = [hard_negative(caption, rng) for caption in positives for _ in range(NEGATIVES)]
        tokens = tokenizer(positives + negatives, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        same = torch.tensor([identities[caption] for caption in positives], device=device)
        duplicates = (same[:, None] == same[None, :]).fill_diagonal_(0)
        target = torch.arange(batch, device=device)
        loss = torch.zeros((), device=device)
        hits = 0.0
        embeddings = network(to_pixels(pictures[chosen].to(device)))
        for encoder, embedding in zip(encoders, embeddings, strict=True):
            text = functional.normalize(encoder(input_ids=tokens.input_ids.to(device)).text_embeds, dim=-1)
            scale = network.log_scale.exp().clamp(max=100)
            among = (scale * embedding @ text[:batch].T).masked_fill(duplicates, -torch.inf)
            own = scale * torch.einsum("bd,bnd->bn", embedding, text[batch:].reshape(batch, NEGATIVES, -1))
            loss = loss + functional.cross_entropy(torch.cat([among, own], dim=1), target)
            loss = loss + 0.5 * functional.cross_entropy(among.T, target)
            hits += (among.diagonal()[:, None] > own).float().mean().item() / 2
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimiser.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            meta["curve"].append([step + 1, round(loss.item(), 4), round(hits, 4)])
            rate = (step + 1 - first) / (time.perf_counter() - start)
            losses = f"loss {loss.item():.3f}, beats hard negatives {hits:.3f}"
            logger.info(f"text step {step + 1}/{steps}, {losses}, {rate:.2f} steps/s")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            meta["step"] = step + 1
            save_training(state, modules=modules, optimiser=optimiser, meta=meta)
    tensors = {
        f"{name}/{key}": tensor
        for name in ("text_encoder", "text_encoder_2")
        for key, tensor in modules[name].state_dict().items()
    }
    write_tensors(out / "text.safetensors", tensors, meta)
