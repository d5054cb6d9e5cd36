"""Change what strangers write and what users type, at random; what comes of it is acceptance or one line.

    python tests/reliability/fuzz.py --inputs 500 --seed 1 [--report FILE]

Each input starts from a valid file or command line and gets one to three changes: of single bytes, or of values in its
JSON. The reader must take it or raise UserError with a message of one line. Anything else is a fault, and is listed.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from fake_ranks import save
from text_data import text_data

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.config import ClmConfig
from gptj_train.data.preparation import open_stores
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.launch.command_line import compose
from gptj_train.launch.run_status import is_done
from gptj_train.metrics_file import read_metrics
from gptj_train.weights import manifest

LONGEST_INPUT = 30  # seconds
MEMORY = 16 * 2**30  # bytes of address space
STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 255, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan")),
    *("", " ", "x", "0", "yes", "null", "../../etc/passwd", "\ud800", "\0", "a\nb", "🙂", "x" * 5000),
    *([], [[]], {}, {"": 0}, [1, "a", None], list(range(50))),
]
ARGUMENTS = [
    *("max_steps", "optim.lr", "optim.betas", "engine", "model.n_layer", "data.train", "data.weights", "tracking"),
    *("+config", "seed", "lora", "engine.precision", "output_dir", "data.kind", "resume", "generate", "_target_"),
    *("sample_prompt", "data.chat_template", "warmup_ratio", "epochs", "init_from", "+engine.deepspeed", "~optim"),
]
VALID_LINE = ["output_dir=run", "data.train=train.jsonl", "max_steps=3", "tokenizer=tokenizer", "init_from=null"]
WORDS = [
    *("1", "-1", "0", "1e400", "nan", "inf", "true", "null", "???", "", "[]", "{}", "[1,2", "{a:1}", "a=b", "'x"),
    *("${x}", "${oc.env:HOME}", "${oc.env:'A_KEY'}", "${now:%Y}", "a b", "a,b", "../..", "/", "\\", "é", "$(x)"),
    *("1_000", "0x10", "1e12", "99999999999999999999", "quickstart", "gptj_6b_lora", "none", "cpu", "zero3", "@x"),
    *("!!int 3", '"x"', "::"),
]


def flip(data: bytearray, chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randint(0, len(data)) :]


def drop(data: bytearray, chance: random.Random) -> None:
    start = chance.randint(0, len(data))
    del data[start : start + chance.randint(1, 50)]


def repeat(data: bytearray, chance: random.Random) -> None:
    start = chance.randint(0, len(data))
    data[start:start] = data[start : start + chance.randint(1, 50)]


def insert(data: bytearray, chance: random.Random) -> None:
    start = chance.randint(0, len(data))
    data[start:start] = chance.choice([b"\0", b"\xff\xfe", b'"', b"{", b"[" * 2000, b",", b"9" * 400, b"NaN", b"\n"])


BYTE_CHANGES = (flip, cut, drop, repeat, insert)


def change_value(value: Any, chance: random.Random) -> Any:
    """Replace, remove, double or rename something at a random depth."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.15:
        return chance.choice(STRANGE)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = chance.choice(keys)
    how = chance.random()
    if how < 0.7:
        value[key] = change_value(value[key], chance)
    elif how < 0.8:
        del value[key]
    elif how < 0.9 and isinstance(value, dict):
        value[chance.choice(["", "x", "__metadata__", "format", str(key) + " "])] = value.pop(key)
    elif isinstance(value, dict):
        value["extra"] = value[key]
    else:
        value.append(value[key])
    return value


def changed_json(data: bytes, chance: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(chance.randint(1, 3)):
        value = change_value(value, chance)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def changed(data: bytes, is_json: bool, chance: random.Random) -> bytes:
    """Return a mutation of a file."""
    if is_json and chance.random() < 0.7:
        return changed_json(data, chance)
    mutable = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        chance.choice(BYTE_CHANGES)(mutable, chance)
    return bytes(mutable)


def changed_safetensors(data: bytes, chance: random.Random) -> bytes:
    """As ``changed``, of the header alone for most inputs, with its right length in front."""
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.3:
        return changed(data, False, chance)
    header = changed(data[8 : 8 + length], True, chance)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def changed_manifest(data: bytes, chance: random.Random) -> bytes:
    """As ``changed``, with a valid hash of itself: a stranger can compute it too."""
    text = changed(data, True, chance)
    try:
        body = json.loads(text)
        del body["sha256"]
        return json.dumps(body | {"sha256": manifest._hash_of(body)}).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return text


def changed_line(chance: random.Random) -> list[str]:
    line = list(VALID_LINE)
    for _ in range(chance.randint(1, 2)):
        separator = "=" if chance.random() < 0.9 else chance.choice(["", " ", "==", ":"])
        line.insert(chance.randint(0, len(line)), chance.choice(ARGUMENTS) + separator + chance.choice(WORDS))
    if chance.random() < 0.1:
        spoilt = bytearray(chance.choice(line).encode())
        chance.choice(BYTE_CHANGES)(spoilt, chance)
        line.append(spoilt.decode(errors="replace").replace("\0", "?"))
    return line


def read_tokenizer(folder: Path) -> object:
    tokenizer = Tokenizer.load(folder)
    return tokenizer.decode(tokenizer.encode("Some text, to be read."))


def read_stores(folder: Path) -> object:
    data = text_data(cache_dir=str(folder / "cache"))
    (store,) = open_stores([folder / "train.jsonl"], data, Tokenizer.load(folder.parent / "good tokenizer"))
    return store.names, store.skipped.values(), int(store.tokens.sum()) + int(store.ends[-1])


def read_indexed(folder: Path) -> object:
    return GPTJForCausalLM.from_pretrained(folder / "indexed")


def read_manifest(folder: Path) -> object:
    return manifest.Manifest.read(folder / "step_00000001")


def as_json(data: bytes, chance: random.Random) -> bytes:
    return changed(data, True, chance)


def as_bytes(data: bytes, chance: random.Random) -> bytes:
    return changed(data, False, chance)


class Target(NamedTuple):
    """A kind of input: the file that is changed, how, and how it is read."""

    file: str
    change: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], object]


TARGETS = {
    "config.json": Target("config.json", as_json, GPTJConfig.from_pretrained),
    "generation_config.json": Target("generation_config.json", as_json, GPTJForCausalLM.from_pretrained),
    "tokenizer.json": Target("tokenizer.json", as_json, read_tokenizer),
    "tokenizer_config.json": Target("tokenizer_config.json", as_json, read_tokenizer),
    "safetensors": Target("model.safetensors", changed_safetensors, GPTJForCausalLM.from_pretrained),
    "weight index": Target("indexed/model.safetensors.index.json", as_json, read_indexed),
    "checkpoint manifest": Target("step_00000001/manifest.json", changed_manifest, read_manifest),
    "store.json": Target("cache/*/store.json", as_json, read_stores),
    "metrics.jsonl": Target("metrics.jsonl", as_bytes, read_metrics),
    "status.json": Target("status.json", as_json, lambda folder: is_done(folder, {})),
}


def make_folder(folder: Path) -> None:
    """Write a valid folder that holds every target's file."""
    text = '{"text": "Some text, to be read."}\n'
    tokenizer = Tokenizer.train([text], 300)
    config = GPTJConfig(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    GPTJForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    tokenizer.save(folder.parent / "good tokenizer")
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.9, "max_length": 20}')
    (folder / "status.json").write_text('{"state": "done", "step": 3, "request": "x"}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "kind": "train"}\n{"step": 2, "loss": 2.0}\n')
    (folder / "train.jsonl").write_text(text * 5)
    read_stores(folder)

    indexed = folder / "indexed"
    indexed.mkdir()
    shutil.copy(folder / "config.json", indexed)
    shutil.copy(folder / "model.safetensors", indexed / "part.safetensors")
    names = GPTJForCausalLM.from_pretrained(folder).state_dict()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "part.safetensors")}
    (indexed / "model.safetensors.index.json").write_text(json.dumps(index))

    save(folder, 1)
    (folder / "checkpoints" / "step_00000001").rename(folder / "step_00000001")


def read_line(line: list[str]) -> object:
    return compose("clm", line, ClmConfig)


# --- outcomes ---


class SlowError(Exception):
    """An input took longer than ``LONGEST_INPUT``."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise SlowError


def outcome(read: Callable[[], object]) -> str:
    """Return "accepted", "refused", or what is wrong with the answer."""
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(LONGEST_INPUT)
    try:
        read()
    except UserError as error:
        return "refused" if len(str(error)) > 10 else f"a message without content: {error}"
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    return "accepted"


def fuzz(inputs: int, seed: int, targets: list[str]) -> dict[str, Any]:
    """Return, for each target, how many inputs were accepted and refused, and the faults."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "valid"
        folder.mkdir()
        make_folder(folder)
        for name in targets:
            chance = random.Random(f"{seed} {name}")
            counts: Counter[str] = Counter()
            faults = []
            for _ in range(inputs):
                if name == "command line":
                    assert outcome(partial(read_line, VALID_LINE)) == "accepted"
                    given: Any = changed_line(chance)
                    answer = outcome(partial(read_line, given))
                else:
                    (file,) = folder.glob(TARGETS[name].file)
                    valid = file.read_bytes()
                    read = partial(TARGETS[name].read, folder)
                    assert outcome(read) == "accepted", f"{name}: the valid one"
                    given = TARGETS[name].change(valid, chance)
                    file.write_bytes(given)
                    answer = outcome(read)
                    file.write_bytes(valid)
                if answer not in ("accepted", "refused"):
                    faults.append([answer, str(given[:300])])
                    answer = "fault"
                counts[answer] += 1
            results[name] = {"accepted": counts["accepted"], "refused": counts["refused"], "faults": faults}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=[*TARGETS, "command line"], default=[*TARGETS, "command line"])
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    # An input that asks for terabytes must fail here, not take the machine's memory.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    results = fuzz(given.inputs, given.seed, given.targets)
    for name, result in results.items():
        print(
            f"{name:<24} accepted {result['accepted']:5} refused {result['refused']:5} faults {len(result['faults'])}"
        )
        for fault in result["faults"]:
            print("   ", *fault)
    if given.report:
        report = {"inputs of each kind": given.inputs, "seed": given.seed, **results}
        given.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
