"""The switches of the method: defaults, limits, and the way to JSON and back."""

import json
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from ofl_sam2.errors import InputError
from ofl_sam2.settings import Order, Settings


def test_settings_survive_json():
    settings = Settings(order=Order.FIRST_TO_LAST, gamma=0.5, recent=0, overlap=True)
    restored = Settings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert restored == settings
    assert restored.order is Order.FIRST_TO_LAST


def test_every_field_is_documented():
    assert [field.name for field in fields(Settings) if field.name not in str(Settings.__doc__)] == []


def test_the_unet_weighs_as_much_as_its_views():
    assert Settings().unet_weight(1) == pytest.approx(2 / 3)
    assert Settings(unet_views=0.0).unet_weight(3) == 0
    assert Settings(unet_views=3.0).unet_weight(3) == 0.5


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        Settings().gamma = 0.1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": 1.5}, "gamma is 1.5; it must be between 0 and 1"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"gamma": "0.5"}, "gamma is '0.5'; it must be of type float"),
        ({"recent": 7}, "recent is 7; it must be between 0 and 6"),
        ({"recent": 2.5}, "recent is 2.5; it must be of type int"),
        ({"supports": True}, "supports is True; it must be of type int"),
        ({"overlap": "false"}, "overlap is 'false'; it must be of type bool"),
        ({"supports": 2, "memory_supports": 3}, "supports is 2; it must be at least memory_supports"),
        ({"supports": 4, "absent_supports": 4}, r"more than absent_supports \(4\)"),
        ({"memory_supports": 0}, "memory_supports is 0; it must be at least 1"),
        ({"absent_supports": -1}, "absent_supports is -1; it must be at least 0"),
        ({"first_steps": -1}, "first_steps is -1"),
        ({"pool_slices": 0}, "pool_slices is 0; it must be at least 1"),
        ({"query_rate": 1.1}, "query_rate is 1.1"),
        ({"order": "sideways"}, "order is 'sideways'; choose outward or first_to_last"),
        ({"gama": 0.5}, "Unknown settings: gama. Known: .*gamma"),
    ],
)
def test_what_cannot_work_is_refused_in_words(wrong, message):
    with pytest.raises(InputError, match=message):
        Settings.from_dict(wrong)


def test_numbers_of_numpy_and_names_of_orders_are_taken():
    settings = Settings(gamma=np.float32(0.5), supports=np.int64(8), order="first_to_last", query_rate=1)
    assert (settings.gamma, settings.supports, settings.order) == (0.5, 8, Order.FIRST_TO_LAST)
