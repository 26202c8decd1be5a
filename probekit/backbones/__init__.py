"""What is probed: any diffusers text-to-image DiT, as a function from (prompt, image) to features of every block.

In the order of the data flow: `images` and `latents` turn files into near-clean latents, `conditioning` has the
family's own pipeline build the transformer's inputs, `capture` reads the blocks. `families` is the table of what is
known about each transformer class; `loading`, `devices`, `weights` and `cache` do what their names say; `base` holds
what the transformers of one pipeline share, and `backbone` joins everything.
"""

from probekit.backbones.backbone import Backbone
from probekit.backbones.latents import noise

__all__ = ["Backbone", "noise"]
