"""Scores of a model's answers to held-out questions: reading them, asking, metrics, tables, pages, comparisons."""
