"""The audit: can the numbers of a language model be believed? One check a file; `runner.py` calls them all."""
