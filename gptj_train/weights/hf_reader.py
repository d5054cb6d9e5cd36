"""Read tensors from Transformers folders: safetensors or legacy .bin, one file or sharded."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptj_train.errors import UserError
from gptj_train.failed_download import failed_download
from gptj_train.untrusted_files import check_stays, read_json
from gptj_train.weights.stored import StoredWeights, is_finite

_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Name of the single file, and of the index of several; the first that is there counts, as in Transformers."""

ADAPTER_LAYOUTS = (
    ("adapter_model.safetensors", "adapter_model.safetensors.index.json"),
    ("adapter_model.bin", "adapter_model.bin.index.json"),
)
"""The same of PEFT's adapter folders."""

_LARGEST_INDEX = 50_000_000  # bytes; GPT-J's has 25 thousand
_MOST_MAPPED = 200_000_000  # bytes
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,200}")  # a file system takes 255 bytes
_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class HFWeights(StoredWeights):
    """The tensors of a Transformers folder, read one at a time from memory-mapped files.

    Files are data: nothing in them runs, and no file outside the folder is opened, except the blobs to which a
    folder in a hub cache links.

    Raises:
        UserError: no weights in the folder, or an index or file that cannot be trusted or read.
    """

    def __init__(self, folder: str | Path, layouts: tuple[tuple[str, str], ...] = _LAYOUTS) -> None:
        self.folder = Path(folder)
        self._layouts = layouts
        self._open: dict[str, Any] = {}
        self._mapped: Counter[str] = Counter()  # bytes read from each file since it was opened
        self._file_of = self._locate()

    def _locate(self) -> dict[str, str]:
        """Return tensor name -> file name."""
        for single, index in self._layouts:
            check_stays(self.folder, single)
            check_stays(self.folder, index)
            if (self.folder / single).is_file():
                return dict.fromkeys(self._handle(single).keys(), single)
            if (self.folder / index).is_file():
                return _read_index(_checked_path(self.folder, index))
        (first, _), (second, _) = self._layouts
        raise UserError(
            f"{self.folder}: no {first}, {second} or their index here; "
            "give the folder that Transformers' save_pretrained or our export wrote"
        )

    def _handle(self, file: str) -> Any:
        """Open a file, once: a safetensors handle, or the dictionary of a .bin file."""
        if file not in self._open:
            path = _checked_path(self.folder, file)
            instead = failed_download(path)
            if instead is not None:
                raise UserError(f"{path}: cannot be read as weights (it is {instead})")
            self._open[file] = _open_safetensors(path) if file.endswith(".safetensors") else _open_bin(path)
        return self._open[file]

    def close(self) -> None:
        for file in list(self._open):
            self._release(file)

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        handle = self._handle(self._file_of[name])
        if name not in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            raise UserError(f"{self.folder}: the index places {name} in {self._file_of[name]}, which lacks it")
        if isinstance(handle, dict):
            tensor = handle[name]
            return tuple(tensor.shape), _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        stored = handle.get_slice(name)
        return tuple(stored.get_shape()), stored.get_dtype()

    def tensor(self, name: str) -> Tensor:
        handle = self._handle(self._file_of[name])
        tensor: Tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        return tensor

    def check_finite(self, name: str, tensor: Tensor) -> None:
        if not is_finite(tensor):
            path = self.folder / self._file_of[name]
            raise UserError(f"{path}: {name} contains NaN or infinity; the model is damaged, download it again")

    def read(self, name: str, start: int, into: Tensor) -> None:
        flat = self.tensor(name).reshape(-1)
        stored = flat.narrow(0, start, into.numel())
        # While it is read: later, the loss would be NaN and the learning rate be blamed.
        self.check_finite(name, stored)
        into.copy_(stored)
        # Only these elements came from the disk, but they stay mapped and count as memory of this process. Once
        # many have been read, the file is closed and mapped anew by the next read.
        file = self._file_of[name]
        self._mapped[file] += into.numel() * flat.element_size()
        # A file of the old torch format is not mapped: to open it again would be to read it in whole again.
        if self._mapped[file] > _MOST_MAPPED and (file.endswith(".safetensors") or is_zipfile(self.folder / file)):
            self._release(file)

    def _release(self, file: str) -> None:
        handle = self._open.pop(file)
        self._mapped[file] = 0
        if hasattr(handle, "__exit__"):
            handle.__exit__(None, None, None)


def _checked_path(folder: Path, file: str) -> Path:
    """Return the path of a file, after checking that it is a regular one and lies in the folder."""
    path = folder / file
    check_stays(folder, file)
    if not path.is_file():
        raise UserError(f"{path}: cannot be read as weights (the index names it, but it is not there)")
    return path


def _read_index(path: Path) -> dict[str, str]:
    instead = failed_download(path)
    if instead is not None:
        raise UserError(f"{path}: not a readable weight index (it is {instead})")
    try:
        weight_map: dict[str, str] = read_json(path, _LARGEST_INDEX)["weight_map"]
        plain = all(_PLAIN_NAME.fullmatch(file) for file in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable weight index ({error})") from None
    if not plain:
        raise UserError(f"{path}: weight_map names a file outside the folder of the index")
    return weight_map


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt").__enter__()  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as weights ({error})") from None


def _open_bin(path: Path) -> dict[str, Tensor]:
    # Before version 1.6 torch wrote no archive but a stream of records, which cannot be mapped: it is read in whole.
    is_archive = is_zipfile(path)
    try:
        state = torch.load(path, map_location="cpu", mmap=is_archive, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as weights ({error})") from None
    except Exception as error:
        # torch raises pickle.UnpicklingError for anything but tensors; importing pickle is not allowed here.
        raise UserError(f"{path}: refused, it holds more than tensors ({type(error).__name__})") from None
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{path}: refused, it is not a plain dictionary of tensors")
    if is_archive and not _is_complete(path, state):
        raise UserError(f"{path}: cannot be read as weights (its records are not as long as its tensors)")
    return state


def _is_complete(path: Path, state: dict[str, Tensor]) -> bool:
    """Compare the bytes of the archive's records with those of the tensors' storages."""
    # A mapped record that is too short would be continued with whatever follows it in the file.
    with ZipFile(path) as archive:
        stored = sum(record.compress_size for record in archive.infolist() if "/data/" in record.filename)
    # By address: tensors may share a storage, which is in the archive once.
    storages = {}
    for tensor in state.values():
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) == stored
