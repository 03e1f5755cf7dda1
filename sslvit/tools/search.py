"""Search."""
from dataclasses import dataclass


@dataclass
class Config:
    index: str = ""


def run(config: Config) -> None:
    """Soon."""
