"""How long things take here, as ratios: a dump beside the bare transformer, the store beside the bare disk."""
