"""Watching a deployment: what it measures of itself, the alerts that follow from that, and who is told of them."""
