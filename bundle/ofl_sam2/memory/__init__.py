"""What is kept: labelled slices, the learner's working set, frozen features."""
