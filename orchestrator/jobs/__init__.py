"""The scheduled jobs: which there are, when each is due, and who runs it. What they do is in `ops`."""
