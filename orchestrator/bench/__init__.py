"""`truthgpt bench`: a load generator for endpoints that generate text or encode it, and what it measures.

`measure` (running.py) puts one `Load` (plan.py) on one `Target` and returns a `Run` (figures.py).
"""
