"""How figures are written for people. Imports nothing."""


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03 and 1,000:00:00."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours:,}:{rest // 60:02}:{rest % 60:02}"
