"""The registry: a value means one structure for ever, and names are never guessed."""

import json

import numpy as np
import pytest

from ofl_sam2.errors import InputError, ModelError
from ofl_sam2.service.structures import StructureRegistry


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model" / "structures.json"


@pytest.fixture
def registry(path):
    return StructureRegistry(path, ["liver", "spleen"])


def info(**names):
    return [{"name": name, "idx": idx} for name, idx in names.items()]


def remap(registry, values, label_info=None):
    return registry.remap(np.array(values, np.uint16), label_info).tolist()


def test_names_from_the_start_keep_their_order(registry, path):
    assert registry.names() == {"liver": 1, "spleen": 2}
    assert StructureRegistry(path, ["kidney", "Liver "]).names() == {"liver": 1, "spleen": 2, "kidney": 3}
    assert registry.names() == {"liver": 1, "spleen": 2, "kidney": 3}


def test_without_names_no_file_is_written(path):
    assert StructureRegistry(path).names() == {}
    assert not path.exists()


def test_client_values_become_registry_values(registry):
    assert remap(registry, [0, 1, 2], info(spleen=1, LIVER=2)) == [0, 2, 1]
    assert registry.names() == {"liver": 1, "spleen": 2}


def test_a_new_structure_gets_the_next_value_and_unused_ones_none(registry):
    entries = [*info(background=0, unused=1), {"name": " Portal Vein ", "idx": 9.0, "color": [1, 2, 3]}]
    assert remap(registry, [[0, 9]], entries) == [[0, 3]]
    assert registry.names() == {"liver": 1, "spleen": 2, "Portal Vein": 3}


def test_values_without_names_are_the_registrys_own(registry):
    assert remap(registry, [0, 2, 1]) == [0, 2, 1]
    assert remap(registry, [7, 1], []) == [7, 1]
    assert registry.names() == {"liver": 1, "spleen": 2, "structure_7": 7}
    assert remap(registry, [5], info(kidney=5)) == [8]


def test_what_was_given_once_stays(registry):
    assert remap(registry, [1, 2], info(a=1, b=2)) == [3, 4]
    assert remap(registry, [1, 2], info(b=1, a=2)) == [4, 3]


@pytest.mark.parametrize(
    ("label_info", "message"),
    [
        (info(liver=1), "value.s. 2, which its label_info does not name"),
        ([{"name": "a", "idx": 1}, {"name": "b", "idx": 1}], "two names"),
        ([{"name": "a", "idx": 1}, {"name": " A", "idx": 2}], "several values one name"),
        (info(a=1, b="2"), "idx '2'"),
        (info(a=1, b=True), "idx True"),
        (info(a=1, b=1.5), "idx 1.5"),
        (info(a=1, b=float("nan")), "idx nan"),
        (info(a=0, b=2), "0 is the background"),
        (info(a=1, background=2), "value.s. 2, which"),
        ([{"name": "a"}], "label_info holds"),
        ([{"idx": 1}], "label_info holds"),
        ([{"name": None, "idx": 1}], "label_info holds"),
        (["a", "b"], "label_info holds"),
        ([{"name": "  ", "idx": 1}], "no name of a structure"),
        ([{"name": "a\nb", "idx": 1}], "no name of a structure"),
        ([{"name": "x" * 101, "idx": 1}], "no name of a structure"),
    ],
)
def test_ambiguous_names_are_refused_and_nothing_is_added(registry, path, label_info, message):
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        remap(registry, [1, 2], label_info)
    assert path.read_bytes() == before


def test_the_same_entry_twice_is_no_contradiction(registry):
    assert remap(registry, [4], [{"name": "liver", "idx": 4}, {"name": "Liver", "idx": 4}]) == [1]


def test_a_rename_keeps_value_and_old_labels(registry, path):
    registry.rename("spleen", "Milz")
    assert registry.names() == {"liver": 1, "Milz": 2}
    again = StructureRegistry(path)
    assert remap(again, [1], info(spleen=1)) == remap(again, [1], info(milz=1)) == [2]
    registry.rename("milz", "Spleen")
    assert registry.names() == {"liver": 1, "Spleen": 2}


def test_a_merge_sends_old_and_new_labels_to_one_value(registry):
    remap(registry, [3], info(kidney=3))
    registry.merge("liver", "spleen")
    registry.merge("spleen", "kidney")
    assert registry.names() == {"kidney": 3}
    assert remap(registry, [1, 2, 3]) == [3, 3, 3]
    assert remap(registry, [1, 2], info(liver=1, spleen=2)) == [3, 3]
    assert remap(registry, [1], info(heart=1)) == [4]


def test_values_of_merged_structures_are_not_used_again(registry):
    remap(registry, [3], info(kidney=3))
    registry.merge("kidney", "liver")
    assert remap(registry, [1], info(heart=1)) == [4]


def test_renames_and_merges_that_cannot_be_are_refused(registry):
    for call, message in [
        (lambda: registry.rename("heart", "x"), "no structure 'heart'. There are: liver, spleen"),
        (lambda: registry.rename("liver", " SPLEEN"), "another structure 'SPLEEN'"),
        (lambda: registry.rename("liver", ""), "no name of a structure"),
        (lambda: registry.rename("liver", "Background"), "is the value 0"),
        (lambda: registry.merge("liver", "heart"), "no structure 'heart'"),
        (lambda: registry.merge("liver", "Liver"), "the same structure"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    registry.merge("liver", "spleen")
    with pytest.raises(InputError, match="no structure 'liver'"):
        registry.rename("liver", "x")
    assert registry.names() == {"spleen": 2}


def test_background_cannot_be_a_structure(path):
    with pytest.raises(InputError, match="is the value 0"):
        StructureRegistry(path, ["background"])


def test_an_unnamed_value_whose_name_is_taken_is_refused(registry):
    remap(registry, [1], info(structure_9=1))
    with pytest.raises(InputError, match="'structure_9' is 3 here"):
        remap(registry, [9])


def test_there_are_255_values(registry):
    with pytest.raises(InputError, match="values go from 1 to 255"):
        remap(registry, [256])
    assert remap(registry, [255]) == [255]
    assert remap(registry, [1], info(heart=1)) == [3]
    for value in range(4, 255):
        assert remap(registry, [1], info(**{f"part {value}": 1})) == [value]
    with pytest.raises(InputError, match="would get the value 256"):
        remap(registry, [1], info(lung=1))


def test_two_processes_give_no_value_twice(registry, path):
    other = StructureRegistry(path)
    assert remap(registry, [1], info(a=1)) == [3]
    assert remap(other, [1], info(b=1)) == [4]
    assert registry.names() == other.names() == {"liver": 1, "spleen": 2, "a": 3, "b": 4}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"structures": {"a": "x"}, "names": {}, "merged": {}}'])
def test_a_damaged_file_is_named_and_not_overwritten(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ModelError, match=r"structures\.json is damaged"):
        StructureRegistry(path, ["liver"])
    assert path.read_text() == content


def test_the_file_is_plain_json(registry, path):
    assert json.loads(path.read_text())["structures"] == {"liver": 1, "spleen": 2}


def test_an_image_in_the_place_of_a_label_adds_no_structures(tmp_path):
    registry = StructureRegistry(tmp_path / "structures.json")
    with pytest.raises(InputError, match=r"255 unknown values without a name\. Is it an image"):
        registry.remap(np.arange(256))
    assert registry.names() == {}
    assert len(np.unique(registry.remap(np.arange(118)))) == 118
