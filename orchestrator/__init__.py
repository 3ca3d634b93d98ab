"""The gateway in front of Triton, and the `truthgpt` command. No torch here."""
