"""Settings of every test."""

from hypothesis import settings

settings.register_profile("truthgpt", deadline=None)  # a deadline of 200 ms finds busy machines, not slow code
settings.load_profile("truthgpt")
