"""The report on a run: one page, made from the run folder alone."""
