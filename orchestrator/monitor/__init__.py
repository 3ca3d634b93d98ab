"""Watching a deployment: what the machine and the requests are like, what is kept of it, and who is told."""
