"""The frozen SAM2: configurations, building, weights, and the four functions the rest uses."""
