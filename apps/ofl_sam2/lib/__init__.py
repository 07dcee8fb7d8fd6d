"""The MONAI Label app: its tasks and the state they share. The algorithm is in the library `ofl_sam2`."""
