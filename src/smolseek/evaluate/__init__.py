"""Judging models: losses, and how far two models are apart."""
