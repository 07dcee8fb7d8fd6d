"""OFL-SAM2: label a few volumes, segment the rest.

volume -> slices -> frozen SAM2 features -> few-shot learner -> adaptive fusion with SAM2 memory
-> frozen mask decoder -> memory -> label in the original grid
"""

__version__ = "0.1.0"
