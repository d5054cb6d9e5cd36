"""Write a number with its noun or unit in the right form."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return "1 window", "2 windows" or "12,000 windows"; ``noun`` is the singular of a regular plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def sized(size: int) -> str:
    """Return bytes as "1.2 MB", or "3.4 kB" where megabytes would show as 0."""
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"
