"""The annotation service: labels are journaled, learned in the background, and served as immutable snapshots."""
