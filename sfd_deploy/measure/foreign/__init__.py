"""Judges made elsewhere: one module a kind, each with its config, which files it is made of, and how it looks."""
