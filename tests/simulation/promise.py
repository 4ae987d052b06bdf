"""A promise that did not hold."""


class Violation(AssertionError):
    """What was promised, and what happened."""


def hold(promise: bool, words: str) -> None:
    if not promise:
        raise Violation(words)
