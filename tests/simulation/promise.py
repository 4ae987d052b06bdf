"""Check a promise of Rift's while the simulation runs."""


class Violation(AssertionError):
    """A promise did not hold; the message says which."""


def hold(promise: bool, words: str) -> None:
    if not promise:
        raise Violation(words)
