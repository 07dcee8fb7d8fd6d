"""The synthetic study that `synth` writes and the demo falls back to."""

import nibabel as nib
import numpy as np
import pytest

from ofl_sam2.dataset import find_cases, load_case
from ofl_sam2.training.cohort import STRUCTURES, cohort, write_cohort
from ofl_sam2.volume import choose_axis


def test_every_patient_has_both_organs_in_several_slices():
    for seed in range(4):
        for patient in cohort(3, seed):
            assert patient.image.shape == patient.labels.shape == (96, 96, 24)
            assert (patient.image.dtype, patient.labels.dtype) == (np.float32, np.uint8)
            assert np.isfinite(patient.image).all()
            assert set(np.unique(patient.labels)) == {0, *STRUCTURES}
            for value in STRUCTURES:
                assert (patient.labels == value).any((0, 1)).sum() >= 3


def test_patients_share_an_anatomy_but_differ():
    one, other = cohort(2, seed=3)
    assert not np.array_equal(one.image, other.image)
    assert not np.array_equal(one.labels, other.labels)
    for value in STRUCTURES:
        a, b = one.labels == value, other.labels == value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.3


def test_a_seed_gives_the_same_patients_and_another_seed_others():
    first, again, other = (cohort(1, seed)[0] for seed in (5, 5, 6))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.image, other.image)


def test_fewer_patients_are_the_first_of_more():
    assert np.array_equal(cohort(1, seed=2)[0].image, cohort(2, seed=2)[0].image)


def test_the_organs_can_be_seen():
    patient = cohort(1)[0]
    contrast = [patient.image[patient.labels == value].mean() for value in (0, *STRUCTURES)]
    assert np.ptp(contrast) > 0.1 * patient.image.std()


def test_files_are_cases_ready_to_learn_from(tmp_path):
    names = write_cohort(tmp_path / "study", 2, seed=1)
    assert names == ["synthetic_000", "synthetic_001"]
    cases = find_cases(tmp_path / "study" / "images", tmp_path / "study" / "labels", names)
    for case, patient in zip(cases, cohort(2, seed=1), strict=True):
        loaded = load_case(case)
        assert loaded.values == tuple(STRUCTURES)
        assert loaded.volume.spacing == (1.0, 1.0, 2.0)
        assert choose_axis(loaded.volume) == 2
        np.testing.assert_array_equal(loaded.labels, patient.labels)
        np.testing.assert_allclose(loaded.volume.voxels, patient.image)
        assert nib.load(case.image).get_data_dtype() == np.float32


@pytest.mark.parametrize("count", [1, 3])
def test_writing_again_replaces(tmp_path, count):
    write_cohort(tmp_path, 1, seed=1)
    write_cohort(tmp_path, count, seed=2)
    assert len(list((tmp_path / "images").iterdir())) == len(list((tmp_path / "labels").iterdir())) == count
    label = nib.load(tmp_path / "labels" / "synthetic_000.nii.gz")
    np.testing.assert_array_equal(np.asarray(label.dataobj), cohort(1, seed=2)[0].labels)
