"""Configuration: the typed schema behind conf/ and the checks of what cannot work."""
