from pathlib import Path

import pytest
from lib.options import Options

from ofl_sam2.errors import InputError


def test_defaults(tmp_path: Path) -> None:
    options = Options.from_conf(tmp_path, {})
    assert options.model_root == tmp_path / "model"
    assert options.skip_scoring and options.labels == () and options.device == "cpu"


def test_values_are_read(tmp_path: Path) -> None:
    conf = {
        "labels": "liver, left kidney",
        "cache_gb": "0.5",
        "series_gb": "2",
        "image_size": "128",
        "skip_scoring": "false",
    }
    options = Options.from_conf(tmp_path, {**conf, "bundle": "elsewhere", "unknown": "x"})
    assert options.labels == ("liver", "left kidney")
    assert (options.cache_gb, options.series_gb, options.image_size, options.skip_scoring) == (0.5, 2, 128, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", "a,,b"),
        ("labels", "a,A"),
        ("labels", "1=a"),
        ("cache_gb", "much"),
        ("cache_gb", "-1"),
        ("cache_gb", "nan"),
        ("image_size", "big"),
        ("image_size", "100"),
        ("backbone", "unet"),
        ("skip_scoring", "perhaps"),
    ],
)
def test_unusable_value_is_named(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"--conf {name} {value} cannot be used"):
        Options.from_conf(tmp_path, {name: value})


def test_absent_device_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device 'tpu' cannot be used here"):
        Options.from_conf(tmp_path, {"device": "tpu"})
