"""Evaluation of models: losses, and the difference between two models."""
