"""The errors a user can cause: one line that says what was expected, what came and what to do."""


class UserError(ValueError):
    """Wrong input. The command line prints its one line on stderr and exits with 2."""


class Unreachable(UserError):
    """What lies elsewhere cannot be read now: no fault of a sample, and no reason to replace it."""


class BadSample(UserError):
    """An unusable pair of a shard; training replaces and counts it.

    Args:
        shard: file name of the shard.
        key: the sample's key in it.
        reason: what is wrong, in a few words.
    """

    def __init__(self, shard: str, key: str, reason: str):
        super().__init__(f"{shard}: sample {key!r} cannot be used: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # DataLoader workers send exceptions to the main process by pickling their arguments.
        return type(self), (self.shard, self.key, self.reason)
