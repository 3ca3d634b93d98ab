"""``python -m export MODEL``: the same command as ``truthgpt export MODEL``."""

from export.cli import export_command

if __name__ == "__main__":
    export_command(prog_name="python -m export")
