"""Fit learner and fusion to labelled volumes, and pretrain nano on synthetic anatomy."""
