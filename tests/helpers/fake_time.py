"""A clock for tests."""


class FakeTime:
    """Advances only when a clock is read."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.read: list[str] = []

    def now(self) -> float:
        return self.seconds

    def clock(self, name: str, samples: list[float]):
        def read() -> float:
            self.read.append(name)
            self.seconds += 1
            return samples[(len(self.read) - 1) % len(samples)]

        return read
