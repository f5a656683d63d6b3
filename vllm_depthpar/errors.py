"""What ends a program of this package in one line."""


class UserError(Exception):
    """Something that the user has to mend; the message is one line: what was wrong, what is
    allowed. The end of an engine's or a server's log follows it where that is the reason.

    Not a ValueError: pydantic, inside vLLM's config classes, would wrap those in its own report.
    """


def shortened(value: object, limit: int = 60) -> str:
    """Show a value in an error message, in at most so many characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
