"""The line that names hosts and values where the ranks are not about to run the same job."""

from __future__ import annotations

from pathlib import Path

from gptj_train.agreement import RankFacts, find_difference
from gptj_train.weights.fingerprint import folder_fingerprint


def ranks(*values: dict[str, str]) -> list[RankFacts]:
    """Two ranks a host."""
    return [RankFacts(number, f"node{number // 2 + 1}", value) for number, value in enumerate(values)]


def test_equal_ranks_have_no_difference() -> None:
    assert find_difference(ranks(*[{"seed": "0", "optim.lr": "1e-05"}] * 4)) == ""


def test_a_difference_names_hosts_and_values() -> None:
    one, other = {"seed": "0", "optim.lr": "1e-05"}, {"seed": "0", "optim.lr": "2e-05"}
    line = find_difference(ranks(one, one, other, other))
    assert line.startswith("the ranks do not run the same job. optim.lr: 1e-05 on node1, 2e-05 on node2. ")


def test_a_single_rank_of_a_host_is_named() -> None:
    line = find_difference(ranks({"torch": "2.13"}, {"torch": "2.12"}, {"torch": "2.13"}, {"torch": "2.13"}))
    assert "torch: 2.13 on node1 (rank 0), node2, 2.12 on node1 (rank 1)." in line


def test_a_value_that_only_some_have_is_a_difference() -> None:
    assert "new_key: absent on node1, 1 on node2" in find_difference(ranks({}, {}, {"new_key": "1"}, {"new_key": "1"}))


def test_long_lists_and_hashes_are_cut() -> None:
    one = {f"key{number}": "a" * 64 for number in range(8)}
    other = {f"key{number}": "b" * 64 for number in range(8)}
    line = find_difference(ranks(one, one, other, other))
    assert "key4: aaaaaaaa on node1, bbbbbbbb on node2; and 3 more. " in line
    assert "key5" not in line


def test_a_fingerprint_sees_names_sizes_and_places_in_large_files(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1_000_000))
    (tmp_path / ".cache").write_text("of another tool")
    before = folder_fingerprint(tmp_path)
    (tmp_path / ".cache").write_text("changed")
    assert folder_fingerprint(tmp_path) == before
    (tmp_path / "config.json").write_text("{}")
    with_config = folder_fingerprint(tmp_path)
    assert with_config != before
    # Other weights differ nearly everywhere: also in the first, a middle and the last block.
    for place in (0, 999_999):
        changed = bytearray(1_000_000)
        changed[place] = 1
        weights.write_bytes(changed)
        assert folder_fingerprint(tmp_path) != with_config
    weights.write_bytes(bytes(1_000_000))
    assert folder_fingerprint(tmp_path) == with_config
