"""The metric gives the numbers of `ofl-sam2 evaluate`."""

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from ofl_sam2.errors import InputError
from ofl_sam2.evaluation import CaseScore as Scored
from ofl_sam2.evaluation import Report
from ofl_sam2.metrics import score
from ofl_sam2.workflow.metrics import CaseScore
from ofl_sam2.workflow.network import FewShotNetwork


@pytest.fixture(scope="module")
def network(make_segmenter) -> FewShotNetwork:
    return FewShotNetwork(make_segmenter)


@pytest.mark.parametrize("name", ["dice", "hd95", "surface_dice"])
def test_same_numbers_as_the_command_line(network, make_case, name):
    cases = make_case("a"), make_case("b", values=(1,), affine=np.diag([1.0, 2.0, 5.0, 1.0]))
    metric, scored = CaseScore(name, network), []
    for case in cases:
        prediction = np.roll(case.labels, 2, axis=0)
        meta = {"affine": torch.from_numpy(case.volume.affine)}
        metric([torch.from_numpy(prediction)[None]], [MetaTensor(torch.from_numpy(case.labels)[None], meta=meta)])
        structures = network.segmenter.structures
        scored.append(
            Scored(case.volume.name, score(prediction, case.labels, case.volume.spacing, structures, (name,)))
        )
    assert math.isclose(metric.aggregate().item(), Report(tuple(scored)).mean()[name])
    assert metric.get_buffer().shape == (2, 2)
    assert metric.get_buffer()[1, 1].isnan()


def test_voxels_of_another_orientation_are_not_compared(network, make_case):
    case = make_case()
    labels = torch.from_numpy(case.labels)[None]
    here, mirrored = ({"affine": torch.from_numpy(case.volume.affine * flip)} for flip in ([1], [-1, 1, 1, 1]))
    metric = CaseScore("dice", network)
    metric([MetaTensor(labels, meta=here)], [MetaTensor(labels, meta=here)])
    assert metric.aggregate().item() == 1
    with pytest.raises(InputError, match="another orientation or place"):
        metric([MetaTensor(labels, meta=here)], [MetaTensor(labels, meta=mirrored)])


def test_a_reference_needs_a_place_in_space(network):
    with pytest.raises(InputError, match="LoadImaged"):
        CaseScore("dice", network)(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4))
