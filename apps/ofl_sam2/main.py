"""The MONAI Label app of OFL-SAM2: makes the library importable, then hands over to `lib.app`."""

from pathlib import Path

from lib.library import add_library
from monailabel.config import settings

add_library(Path(__file__).parent, settings.MONAI_LABEL_APP_CONF.get("bundle"))

from lib.app import OFLSAM2App  # noqa: E402, F401
