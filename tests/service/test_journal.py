"""The journal: what was acknowledged is there after any crash, and nothing a name says leaves its folder."""

import json
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from ofl_sam2.errors import InputError, ModelError, OFLError
from ofl_sam2.service.journal import LabelEvent, LabelJournal, check_image_id, check_tag
from ofl_sam2.service.label_files import check_label_file, content_sha256, copy_label


@pytest.fixture
def journal(tmp_path):
    return LabelJournal(tmp_path / "journal")


@pytest.fixture
def label(tmp_path):
    """Write a label file of some content."""

    def write(content: str = "one", name: str = "label.nii.gz"):
        path = tmp_path / name
        path.write_text(content)
        return path

    return write


def lines(journal):
    return journal._path.read_text().splitlines()


def refuse(path, missing_ok=False):
    if path.parent.name == "blobs":
        raise PermissionError(13, "Permission denied")


def contents(journal):
    return sorted(path.read_text() for path in journal._blobs.iterdir())


def save(journal, path, image="a", tag="final", **details):
    event = journal.record_save(image, tag, path, details)
    journal.record_written(event)
    return event


def test_a_save_is_pending_until_it_is_written(journal, label):
    event = journal.record_save("a", "final", label(), {"label_info": [{"name": "liver", "idx": 1}]})
    assert journal.pending() == [event] and journal.latest() == {}
    assert journal.blob(event).read_text() == "one" and event.ext == ".nii.gz"
    journal.record_written(event)
    assert journal.pending() == [] and journal.latest() == {("a", "final"): event}


def test_another_process_reads_what_was_written(journal, label, tmp_path):
    reader = LabelJournal(tmp_path / "journal")
    event = save(journal, label(), user="ann")
    assert reader.latest() == {("a", "final"): event}
    newer = save(reader, label("two"))
    journal.record_delete("b", "final")
    assert journal.latest() == reader.latest() == {("a", "final"): newer}
    assert contents(journal) == ["two"]


def test_saves_replace_failures_do_not_and_deletions_remove(journal, label):
    first = save(journal, label("one"))
    failed = journal.record_save("a", "final", label("two"), {})
    journal.record_failed(failed, "disk full")
    assert journal.latest() == {first.key: first} and journal.pending() == []
    second = save(journal, label("three"))
    assert journal.latest() == {first.key: second}
    journal.record_save("a", "final", label("four"), {})
    journal.record_delete("a", "final")
    assert journal.latest() == {} and journal.pending() == []


def test_a_refused_label_is_kept_but_does_not_count(journal, label):
    first = save(journal, label("one"))
    refused = journal.record_refused("a", "final", label("bad"), {"user": "ann"}, "another grid")
    assert journal.blob(refused).read_text() == "bad"
    assert journal.latest() == {first.key: first} and journal.pending() == []
    assert json.loads(lines(journal)[-1])["reason"] == "another grid"
    assert journal.refusals() == [(refused, "another grid")] and journal.history() == [first, refused]


def test_contents_go_when_their_labels_are_replaced_given_up_or_deleted(journal, label, tmp_path):
    save(journal, label("one"))
    journal.record_save("a", "final", label("two"), {})
    assert contents(journal) == ["one", "two"]
    journal.record_failed(journal.record_save("a", "final", label("three"), {}), "disk full")
    assert contents(journal) == ["one"]
    save(journal, label("one"), "b")
    save(journal, label("four"))
    assert contents(journal) == ["four", "one"]
    journal.record_delete("b", "final")
    journal.record_delete("a", "final")
    assert contents(journal) == [] and [event.image for event in journal.history()] == ["a", "a", "a", "b", "a"]
    assert LabelJournal(tmp_path / "journal").latest() == {}


def test_content_of_a_refused_label_goes_with_the_next_one_that_is_taken(journal, label):
    save(journal, label("one"))
    journal.record_refused("a", "final", label("bad"), {}, "another grid")
    save(journal, label("else"), "b")
    assert contents(journal) == ["bad", "else", "one"]
    save(journal, label("two"))
    assert contents(journal) == ["else", "two"]


def test_content_that_cannot_be_removed_is_removed_later(journal, label, tmp_path, monkeypatch, caplog):
    save(journal, label("one"))
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", refuse)
        save(journal, label("two"))
    assert contents(journal) == ["one", "two"] and "stays for now" in caplog.text
    LabelJournal(tmp_path / "journal").prune()
    assert contents(journal) == ["two"]


def test_folders_of_masks_are_pruned_too(journal, tmp_path, label):
    folder = tmp_path / "masks"
    folder.mkdir()
    (folder / "1.png").write_text("1")
    save(journal, folder)
    save(journal, label("two"))
    assert contents(journal) == ["two"]


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_torn_last_line_is_cut_off(journal, label, tmp_path, cut):
    first = save(journal, label("one"))
    whole = journal._path.read_bytes()
    journal.record_save("b", "final", label("two"), {})
    torn = journal._path.read_bytes()[:-cut]
    journal._path.write_bytes(torn)
    restarted = LabelJournal(tmp_path / "journal")
    assert restarted.latest() == {first.key: first} and restarted.pending() == []
    third = save(restarted, label("three"), "c")
    assert journal._path.read_bytes().startswith(whole + b'{"event": "save"')
    assert LabelJournal(tmp_path / "journal").latest() == {first.key: first, third.key: third}


def test_damaged_lines_are_passed_over_with_a_warning(journal, label, tmp_path, caplog):
    first = save(journal, label("one"))
    with journal._path.open("ab") as file:
        file.write(b'\x00\xff\n[]\n{"event": "save"}\n{"event": "delete"}\n')
        file.write(lines(journal)[0].replace('"a"', '"../../a"').encode() + b"\n")
    second = save(journal, label("two"), "b")
    assert LabelJournal(tmp_path / "journal").latest() == {first.key: first, second.key: second}
    assert caplog.text.count("damaged line") == 10


def test_a_damaged_journal_removes_no_content(journal, label, tmp_path):
    save(journal, label("one"))
    with journal._path.open("ab") as file:
        file.write(b"torn\n")
    save(journal, label("two"))
    LabelJournal(tmp_path / "journal").prune()
    assert contents(journal) == ["one", "two"]


def test_content_without_a_line_is_removed_later(journal, label, tmp_path, monkeypatch):
    def full(file, end, content):
        raise OFLError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("ofl_sam2.service.journal._write_at", full)
        with pytest.raises(OFLError, match="disk is full"):
            journal.record_save("a", "final", label("one"), {})
    (journal._blobs / ".0a.partial.x.nii.gz").write_text("torn")
    LabelJournal(tmp_path / "journal").prune()
    assert contents(journal) == []


def test_a_full_disk_leaves_the_journal_as_it_was(journal, label, monkeypatch):
    first = save(journal, label("one"))
    before = journal._path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OFLError, match="disk is full"):
            journal.record_save("b", "final", label("two"), {})
        with pytest.raises(OFLError, match="No space left on device"):
            journal.record_delete("a", "final")
    assert journal._path.read_bytes() == before
    assert journal.latest() == {first.key: first}
    assert save(journal, label("two"), "b").key in journal.latest()


def test_a_damaged_blob_is_not_handed_out(journal, label):
    event = save(journal, label("one"))
    journal.blob(event).write_text("other")
    with pytest.raises(ModelError, match="missing or damaged"):
        journal.blob(event)
    assert journal.blob(save(journal, label("one"))).read_text() == "one"


def test_threads_lose_nothing(tmp_path, label):
    journals = [LabelJournal(tmp_path / "journal") for _ in range(2)]
    path = label()

    def work(number):
        for index in range(5):
            save(journals[number % 2], path, f"case_{number}_{index}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journals[0].latest() == journals[1].latest()
    assert len(journals[0].latest()) == 20


def test_a_folder_of_masks_is_one_label(journal, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        (folder / name).write_text(name)
    event = save(journal, folder)
    assert event.ext == ""
    (folder / "2.png").unlink()
    assert content_sha256(folder) != event.sha256
    copy_label(journal.blob(event), folder)
    assert content_sha256(folder) == event.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "masks"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_text(name)
    replace = os.replace

    def fail(source, target):
        if str(source).endswith(".partial.target"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        copy_label(tmp_path / "new", tmp_path / "target")
    assert (tmp_path / "target" / "1.png").read_text() == "target"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "target"]


@pytest.mark.parametrize("name", ["a", "patient.01", "1.2.840.113654", "häm or ", "a..b", "-", "心" * 66])
def test_ordinary_image_ids_are_taken(name):
    check_image_id(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "a\\b", "/etc/passwd", ".hidden", "a\n", "a\0", "x" * 201, "心" * 67]
)
def test_image_ids_that_could_leave_their_folder_are_refused(name, journal, label):
    with pytest.raises(InputError, match="is no image id"):
        journal.record_save(name, "final", label(), {})
    assert lines(journal) == []


@given(st.text())
def test_an_image_id_that_is_taken_stays_in_its_folder(name):
    try:
        check_image_id(name)
    except InputError:
        return
    assert os.path.dirname(os.path.normpath(f"/labels/{name}.nii.gz")) == "/labels"
    assert os.path.normpath(f"/labels/{name}").startswith("/labels/")


@pytest.mark.parametrize("tag", ["", "..", "a/b", "final\n", "fi nal", "é", "x" * 65])
def test_tags_are_letters_digits_and_dashes(tag):
    with pytest.raises(InputError, match="is no label tag"):
        check_tag(tag)


@pytest.mark.parametrize("name", ["label.txt", "label", "label.mhd", "label.png"])
def test_files_of_other_formats_are_refused(journal, label, name):
    with pytest.raises(InputError, match="is no label file"):
        journal.record_save("a", "final", label(name=name), {})
    assert lines(journal) == []


def test_a_label_of_two_layers_is_refused_in_words(tmp_path):
    layers = np.zeros((4, 4, 4, 2), np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(layers, isVector=True), str(tmp_path / "overlap.seg.nrrd"))
    with pytest.raises(InputError, match="overlapping segments"):
        check_label_file(tmp_path / "overlap.seg.nrrd")
    one = sitk.GetImageFromArray(layers[..., 0])
    one.SetMetaData("Segment0_Layer", "0")
    one.SetMetaData("Segment1_Layer", "0")
    sitk.WriteImage(one, str(tmp_path / "single.seg.nrrd"))
    check_label_file(tmp_path / "single.seg.nrrd")


@pytest.mark.parametrize("field", ["data file", "datafile"])
def test_a_header_that_points_elsewhere_is_refused(tmp_path, field):
    (tmp_path / "secret.raw").write_bytes(bytes(8))
    header = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n{field}: secret.raw\n\n"
    (tmp_path / "label.nrrd").write_text(header)
    with pytest.raises(InputError, match="in another file"):
        check_label_file(tmp_path / "label.nrrd")
    (tmp_path / "label.mha").write_text("NDims = 3\nElementDataFile = secret.raw\n")
    with pytest.raises(InputError, match="in another file"):
        check_label_file(tmp_path / "label.mha")


@pytest.mark.parametrize("content", [b"", b"NRRD0004\ndimension: x\n\n", b"\xff\xfe\x00", b"NRRD0005\ntype"])
def test_a_broken_nrrd_header_is_refused(tmp_path, content):
    (tmp_path / "label.nrrd").write_bytes(content)
    with pytest.raises(InputError, match="Cannot read"):
        check_label_file(tmp_path / "label.nrrd")


def test_a_label_is_another_one_when_its_names_are(tmp_path):
    event = LabelEvent("1", "a", "final", "0" * 64, ".nii.gz", "")
    assert event.version == event.sha256
    named = [
        replace(event, details={"label_info": [{"name": name, "idx": 1}]}) for name in ("liver", "spleen", "liver")
    ]
    assert named[0].version == named[2].version != named[1].version
    assert event.version not in {other.version for other in named}
