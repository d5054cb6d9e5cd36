"""What a process was doing when a signal ended it, for the line that says so."""

from __future__ import annotations

from types import FrameType

_ACTIVITIES = {
    "gptj_train.data": "while it prepared data",
    "gptj_train.training": "while it loaded the model",
    "gptj_train.export": "while it exported the model",
    "gptj_train.inference": "while it evaluated or generated",
}


def activity(frame: FrameType | None) -> str:
    """Return what the interrupted code was doing, by the room that the recipe had called."""
    modules = []
    while frame is not None:
        modules.append(frame.f_globals.get("__name__", ""))
        frame = frame.f_back
    # From the recipe inwards: an export calls other rooms, and is still an export.
    for module in reversed(modules):
        room = ".".join(module.split(".")[:2])
        if room in _ACTIVITIES:
            return _ACTIVITIES[room]
    return "outside the training loop"
