"""Getting the raw data: Hub repositories, lists of addresses, archives, and what the user puts there by hand."""
