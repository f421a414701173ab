"""Many processes: their mesh, the shards of a model, and collectives."""
