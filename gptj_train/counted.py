"""Write a number with its noun in the right form."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return "1 window", "2 windows" or "12,000 windows"; ``noun`` is the singular of a regular plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
