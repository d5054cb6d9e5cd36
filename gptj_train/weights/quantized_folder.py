"""Recognize folders whose weights another program has quantized: their original bits are lost."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gptj_train.errors import UserError

# Ends of names of the tensors that only a quantized model has, and what wrote them.
_MARKS = {
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes, 4 bits (nf4)",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes, 4 bits (fp4)",
    ".SCB": "bitsandbytes, 8 bits",
    ".absmax": "bitsandbytes, 8 bits in blocks",
}
_ORIGINAL = "EleutherAI/gpt-j-6b"


def refuse_quantized(folder: Path, names: Iterable[str]) -> None:
    """Check that no tensor's name is that of a quantized model.

    Raises:
        UserError: there is one; the message names the format and what to take instead.
    """
    found = list(names)
    for mark, format_name in _MARKS.items():
        if any(name.endswith(mark) for name in found):
            raise UserError(
                f"{folder} is quantized already ({format_name}), and nothing here reads that; take the model that it "
                f"was made from, such as {_ORIGINAL}: quantize=nf4 quantizes it while it is read"
            )
