"""The error for a setting that cannot work, and the two checks that raise it."""


class ConfigError(ValueError):
    """A setting that cannot work. The message is one sentence: the key, its value, what to do."""


def refuse(condition: bool, message: str) -> None:
    if condition:
        raise ConfigError(message)


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    refuse(value not in choices, f"{key}={value} is unknown: choose one of {', '.join(choices)}.")
