"""Downloading raw data: Hub repositories, lists of addresses, archives, and files that the user provides by hand."""
