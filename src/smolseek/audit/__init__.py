"""The audit: can the reported numbers of a language model be trusted?

Each file has one group of checks, and `runner.py` runs all of them.
"""
