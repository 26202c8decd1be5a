"""How long things take on this machine, as ratios: a dump beside the bare transformer, the store beside the bare disk."""
