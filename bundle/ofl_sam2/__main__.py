"""`python -m ofl_sam2`."""

from ofl_sam2.cli import main

main()
