"""Scores of texts against references and meanings; nothing here needs torch."""
