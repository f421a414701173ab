"""The report on a run: one HTML page, made from the run folder alone."""
