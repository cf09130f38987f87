"""How figures and settings are written for people. Imports nothing."""


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03 and 1,000:00:00."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours:,}:{rest // 60:02}:{rest % 60:02}"


def dotted(settings: dict, prefix: str = "") -> dict:
    """Nested settings by their dotted keys; an empty group stays as one value."""
    flat = {}
    for key, value in settings.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
