"""Text for display in terminals and pictures."""


def plain(text: str) -> str:
    r"""Text on one line, without control characters, which could overwrite a terminal.

    >>> plain("a\tred\napple")
    'a red apple'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shortened(text: str, length: int) -> str:
    """Plain text of at most so many characters.

    >>> shortened("a very small red apple", 12)
    'a very smal…'
    """
    text = plain(text)
    return text if len(text) <= length else text[: length - 1] + "…"
