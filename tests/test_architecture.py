"""Rules for the source: allowed imports, lengths of files, no code in configs, and that every key is read."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import hydra
import pytest
import yaml
from config_reads import fields_of, fields_read, schemas_within
from omegaconf import OmegaConf

import gptj_train.config
from gptj_train.schema import keys_of, text_keys, validated

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "gptj_train").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
EVERYWHERE = [*PACKAGE, *RECIPES, *SCRIPTS]

MAY_IMPORT = {
    "atomic_write": set(),
    "counted": set(),
    "errors": set(),
    "failed_download": set(),
    "near_name": set(),
    "other_names": set(),
    "secrecy": {"errors"},
    "schema": {"errors", "other_names", "secrecy"},
    "launch": {"atomic_write", "errors", "metrics_file", "near_name", "schema"},
    "untrusted_files": {"errors"},
    "weights": {"atomic_write", "errors", "failed_download", "untrusted_files"},
    "model": {"atomic_write", "errors", "failed_download", "near_name", "schema", "untrusted_files", "weights"},
    "data": {
        "atomic_write",
        "counted",
        "errors",
        "failed_download",
        "launch",
        "near_name",
        "schema",
        "untrusted_files",
    },
    "tasks": {"counted", "data", "errors", "model", "schema"},
    "metrics_file": set(),
    "metric_order": {"errors"},
    "alternative_keys": {"errors"},
    "epochs": {"counted", "data"},
    "tracking": {"atomic_write", "metrics_file", "schema", "tracking_services"},
    "tracking_services": {"errors"},
    "environment": {"launch"},
    "agreement": {"data", "environment", "errors", "launch", "tasks", "weights"},
    "report": {"atomic_write", "counted", "metric_order", "metrics_file", "report_charts"},
    "report_charts": set(),
    "run_summary": {"counted", "metric_order", "metrics_file"},
    "training": {
        *(
            "atomic_write",
            "counted",
            "data",
            "errors",
            "launch",
            "metric_order",
            "model",
            "near_name",
            "schema",
            "tasks",
        ),
        "tracking",
        "weights",
    },
    "export": {"atomic_write", "counted", "data", "errors", "metrics_file", "model", "training", "weights"},
    "initial_model": {"data", "errors", "model"},
    "config": {
        *("alternative_keys", "data", "errors", "initial_model", "launch", "model", "schema", "tasks", "tracking"),
        *("training", "weights"),
    },
    "inference": {"config", "data", "errors", "model", "near_name", "tasks", "weights"},
    "vocabulary": {"config", "data", "errors", "model"},
    "planning": {"config", "counted", "errors", "launch", "model", "training", "weights"},
    "finetune": {
        *("agreement", "config", "counted", "data", "environment", "epochs", "errors", "export", "inference", "launch"),
        *("model", "planning", "report", "run_summary", "tasks", "tracking", "training", "vocabulary", "weights"),
    },
    "__init__": {"launch", "model"},
}
"""Rooms of gptj_train and the rooms whose modules they may import besides their own."""

ONLY_IN = {
    "deepspeed": ["gptj_train/training/engine.py"],
    "hydra": ["gptj_train/launch/command_line.py"],
    "transformers": [],
    "pickle": [],
}
"""Packages, and the files that may import them."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of the imported modules, wherever in the file they are imported."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: write imports in full"
            yield str(node.module)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Calls with the text of what is called."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


each_file = pytest.mark.parametrize("path", EVERYWHERE, ids=name)
each_package_file = pytest.mark.parametrize("path", PACKAGE, ids=name)
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=name)


@each_package_file
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT / "gptj_train").parts[0].removesuffix(".py")
    assert room in MAY_IMPORT, f"add {room} to MAY_IMPORT"
    ours = [module.split(".") for module in imports(path) if module.split(".")[0] == "gptj_train"]
    # "from gptj_train import X" takes X out of model or weights, through __init__.
    rooms = {parts[1] if len(parts) > 1 else "__init__" for parts in ours}
    assert rooms <= MAY_IMPORT[room] | {room}


@each_file
def test_packages_stay_in_their_room(path: Path) -> None:
    used = {module.split(".")[0] for module in imports(path)} & ONLY_IN.keys()
    assert [package for package in used if name(path) not in ONLY_IN[package]] == []


@each_file
def test_no_module_imports_a_recipe_or_a_test(path: Path) -> None:
    assert {module.split(".")[0] for module in imports(path)} & {"recipes", "scripts", "tests"} == set()


@each_package_file
def test_files_fit_in_a_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


@each_recipe
def test_recipes_only_construct(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 45
    assert not {called.rpartition(".")[2] for called, _ in calls(path)} & {"backward", "get", "train_step"}
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.While)
        if isinstance(node, ast.For):
            assert "step" not in ast.unparse(node), f"{name(path)}:{node.lineno}: steps are the trainer's"
        if isinstance(node, ast.Compare):
            assert "task" not in ast.unparse(node), f"{name(path)}:{node.lineno}: a task is its recipe's choice"


@each_file
def test_nothing_runs_what_it_reads(path: Path) -> None:
    for called, call in calls(path):
        where = f"{name(path)}:{call.lineno}"
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"), where
        assert not re.search(r"\binstantiate$", called), where
        assert given.get("shell", "False") == "False", where
        assert given.get("trust_remote_code", "False") == "False", where
        assert given.get("allow_pickle", "False") == "False", where
        if called == "torch.load":
            assert given.get("weights_only") == "True", where
    assert not re.search(r"\b_target_\b", path.read_text())


@pytest.mark.parametrize("path", sorted((ROOT / "gptj_train" / "configs").rglob("*.yaml")), ids=name)
def test_configs_hold_values_not_code(path: Path) -> None:
    text = path.read_text()
    assert "_target_" not in text
    assert "${now:" not in text, "the time differs between ranks"


# --- every key is declared once, explained once, and read ---


def schemas() -> Iterator[tuple[str, type]]:
    """(primary config, schema) of every recipe, from its @recipe(Schema, primary=...)."""
    for path in RECIPES:
        for called, call in calls(path):
            if called == "recipe":
                given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
                cls = getattr(gptj_train.config, ast.unparse(call.args[0]))
                yield (given.get("primary") or path.stem), cls


SCHEMAS = sorted(set(schemas()), key=lambda pair: (pair[0], pair[1].__name__))
KEYS = sorted({(primary, cls, key) for primary, cls in SCHEMAS for key in keys_of(cls)}, key=lambda k: (k[0], k[2]))
each_schema = pytest.mark.parametrize(("primary", "cls"), SCHEMAS, ids=[f"{p}-{c.__name__}" for p, c in SCHEMAS])


def compose(primary: str, *overrides: str) -> Any:
    with hydra.initialize_config_dir(str(ROOT / "gptj_train" / "configs"), version_base="1.3"):
        return hydra.compose(primary, overrides=list(overrides))


def leaves(values: Any, cls: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the YAML's keys, as deep as the schema goes."""
    hints = get_type_hints(cls)
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, dict) and hasattr(hints.get(key), "__dataclass_fields__"):
            yield from leaves(value, hints[key], f"{prefix}{key}.")


def test_every_recipe_has_a_schema() -> None:
    assert len(RECIPES) >= 3
    for path in RECIPES:
        assert "recipe" in {called for called, _ in calls(path)}, f"{name(path)} lacks @recipe"


@each_schema
def test_schema_and_yaml_have_the_same_keys(primary: str, cls: type) -> None:
    composed = OmegaConf.to_container(compose(primary))
    assert sorted(leaves(composed, cls)) == sorted(keys_of(cls))


def test_every_choice_of_every_group_has_keys_of_a_schema() -> None:
    known = [set(keys_of(cls)) for _, cls in SCHEMAS]
    for group in sorted(
        path for path in (ROOT / "gptj_train" / "configs").iterdir() if path.name in set().union(*known)
    ):
        for choice in sorted(group.glob("*.yaml")):
            values = yaml.safe_load(choice.read_text())
            values.pop("defaults", None)
            assert any({f"{group.name}.{key}" for key in values} <= keys for keys in known), name(choice)


FOR_PRESETS = {("PlanConfig", "sample_prompt"), ("PlanConfig", "task")}
"""recipes/plan.py takes the presets of all tasks, whose keys these are; the plan depends on none of them."""

READ_ELSEWHERE = {
    *(("TrainerConfig", "global_batch_size"), ("TrainerConfig", "micro_batch_size")),
    ("TrainerConfig", "rendezvous_timeout"),
}
"""The trainer gets its batches from the task and the engine, which take plain numbers; the ranks meet before it."""


def all_schemas() -> set[type]:
    """Every schema that a recipe's config is made of, and the bases that declare some of its fields."""
    found = set()
    for _, cls in SCHEMAS:
        for schema in schemas_within(cls):
            found |= {base for base in schema.__mro__ if hasattr(base, "__dataclass_fields__")}
    return found


@functools.cache
def read_by(path: Path) -> set[tuple[str, str]]:
    return set(fields_read([tree(path)], all_schemas()))


def read_in(paths: list[Path]) -> set[tuple[str, str]]:
    return set().union(*(read_by(path) for path in paths))


def test_every_key_is_read_by_code_that_holds_its_config() -> None:
    declared = set().union(*(fields_of(cls) for cls in all_schemas()))
    assert declared - read_in([*PACKAGE, *RECIPES]) == FOR_PRESETS


def test_every_key_is_read_in_the_room_that_declares_it() -> None:
    unread = set()
    for cls in all_schemas():
        room = cls.__module__.split(".")[1]
        if room == "config":
            continue  # the recipes' configs, of keys for several rooms
        here = [path for path in PACKAGE if path.relative_to(ROOT / "gptj_train").parts[0] in (room, f"{room}.py")]
        own = {(name, field) for name, field in fields_of(cls) if name == cls.__name__}
        unread |= own - read_in(here)
    assert unread == READ_ELSEWHERE


@pytest.mark.parametrize(
    ("module", "key", "read", "instead"),
    [
        ("finetune", ("FinetuneConfig", "resume"), "cfg.resume", "'auto'"),
        ("finetune", ("FinetuneConfig", "init_from"), "cfg.init_from", "None"),
        ("vocabulary", ("FinetuneConfig", "tokenizer"), "cfg.tokenizer", "None"),
        ("planning/run_plan", ("PlanConfig", "recipe"), "cfg.recipe", "'clm'"),
    ],
)
def test_a_key_counts_as_read_only_where_it_is_read(module: str, key: tuple[str, str], read: str, instead: str) -> None:
    """Other objects have an attribute of the same name: self.tokenizer, cfg.checkpoint.resume."""
    text = (ROOT / "gptj_train" / f"{module}.py").read_text()
    assert key in set(fields_read([ast.parse(text)], all_schemas()))
    assert read in text
    changed = text.replace(read, instead)
    assert key not in set(fields_read([ast.parse(changed)], all_schemas()))


def with_included(file: Path) -> list[Path]:
    """A primary config and those that its defaults take in whole."""
    defaults = yaml.safe_load(file.read_text()).get("defaults", [])
    included = [file.parent / f"{entry}.yaml" for entry in defaults if isinstance(entry, str) and entry != "_self_"]
    return [file, *(one for path in included for one in with_included(path))]


def explained(files: list[Path]) -> set[str]:
    """Keys that stand in one of the files with a comment on their line."""
    lines = [line for file in files for line in file.read_text().splitlines()]
    return {match[1] for line in lines if (match := re.match(r"(\w+):.*?\s# *\S", line))}


def test_every_key_is_explained_where_its_value_stands() -> None:
    unexplained = []
    for primary, _, key in KEYS:
        group, _, leaf = key.rpartition(".")
        configs = ROOT / "gptj_train" / "configs"
        files = sorted((configs / group).glob("*.yaml")) if group else with_included(configs / f"{primary}.yaml")
        if not (ROOT / "gptj_train" / "configs" / key).is_dir() and leaf not in explained(files):
            unexplained.append(f"{primary}: {key}")
    assert unexplained == []


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "gptj_train" / "configs" / "config").glob("*.yaml")), ids=lambda path: path.stem
)
def test_presets_are_valid_once_their_blanks_are_filled(preset: Path) -> None:
    """A preset belongs to at least one recipe."""
    complaints = []
    for primary, cls in SCHEMAS:
        try:
            composed = compose(primary, f"+config={preset.stem}")
            texts = text_keys(cls)
            for key in sorted(OmegaConf.missing_keys(composed)):
                OmegaConf.update(composed, key, "x" if key in texts or key.startswith("data.") else 1)
            assert isinstance(validated(composed, cls), cls)
            return
        except (ValueError, hydra.errors.HydraException) as error:
            complaints.append(f"{primary}: {error}")
    pytest.fail("\n".join(complaints))


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "gptj_train" / "configs" / "config").glob("*.yaml")), ids=lambda path: path.stem
)
def test_presets_say_what_they_are_for(preset: Path) -> None:
    first, second, *_ = preset.read_text().splitlines()
    assert first == "# @package _global_"
    assert second.startswith("# ")
