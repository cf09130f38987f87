"""Hugging Face: architecture and weights, in and out."""
