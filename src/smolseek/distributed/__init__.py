"""Many processes: their mesh, the parts of a model that each holds, and what they tell one another."""
