"""What is probed: any diffusers text-to-image DiT, as a function from (prompt, image) to features of every block.

In the order of the data flow: `images` reads files, `decode_ahead` does so in other processes, `latents` turns pixels
into near-clean latents, `conditioning` has the family's own pipeline build the transformer's inputs, `capture` reads
the blocks, `selftest` checks that they are the image's. `families` says what a row of the table of transformer classes
holds, `catalogue` is the table; `loading`, `devices`, `weights` and
`cache` do what their names say; `base` holds what the transformers of one pipeline share, and `backbone` joins
everything.

Public names are imported on first use, so that a process that only decodes images loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probekit.backbones.backbone import Backbone
    from probekit.backbones.catalogue import register_family
    from probekit.backbones.families import BlockList, Family, Output
    from probekit.backbones.latents import noise

_HOMES = {
    "Backbone": "backbone",
    "BlockList": "families",
    "Family": "families",
    "Output": "families",
    "noise": "latents",
    "register_family": "catalogue",
}

__all__ = ["Backbone", "BlockList", "Family", "Output", "noise", "register_family"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        message = f"module 'probekit.backbones' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"probekit.backbones.{_HOMES[name]}"), name)
